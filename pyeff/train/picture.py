"""Figures without a window, written as whole files."""

import io
from pathlib import Path
from typing import Any

from pyeff._extras import require
from pyeff.checkpoint import write_bytes_atomically


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    Args:
        width, height: inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib", "train", "to draw plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    # The canvas is named, so that no window system is asked for.
    FigureCanvasAgg(figure)
    return figure


def write_picture(figure: Any, path: Path) -> None:
    """Writes a figure, atomically; its kind is the path's suffix (.png, .svg, .pdf)."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "png", dpi=120)
    write_bytes_atomically(path, picture.getvalue())
