"""The figure of expandnets_cifar.py: accuracy over the epochs, and of the last and best ones."""

import io
import statistics
from pathlib import Path
from typing import Any

from pyeff.checkpoint import write_bytes_atomically


def draw(document: dict[str, Any], path: Path) -> None:
    """Left: mean test accuracy of every arm after each epoch. Right: last and best epoch.

    Args:
        document: the results.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    # The canvas is named, so that no window system is asked for.
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2)
    arms = document["arms"]
    for index, (arm, found) in enumerate(arms.items()):
        mean = [statistics.mean(values) for values in zip(*found["curves_percent"], strict=True)]
        curves.plot(range(1, len(mean) + 1), mean, color=f"C{index}", label=arm)
        for offset, which, mark in ((-0.12, "last_percent", "o"), (0.12, "best_percent", "^")):
            values = found[which]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            ends.errorbar(
                index + offset,
                statistics.mean(values),
                deviation,
                fmt=mark,
                capsize=4,
                color=f"C{index}",
                label=which.split("_")[0] + " epoch" if index == 0 else None,
            )
    curves.set_xlabel("epoch")
    curves.set_ylabel("test accuracy, %")
    curves.legend()
    ends.set_xticks(range(len(arms)), list(arms))
    ends.set_ylabel("test accuracy, mean and deviation over seeds, %")
    ends.legend()
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    epochs, task = document["recipe"]["epochs"], document["task"]
    figure.suptitle(f"SmallNet, expanded and not, on {task}, {epochs} epochs")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes_atomically(path, picture.getvalue())
