"""Pictures of a run for segmentation: its course, and some frames beside their labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyeff.train.picture import new_figure, write_picture
from pyeff.train.segmentation_data import Colour
from pyeff.train.segmentation_overlay import coloured, overlay

_STAGES = {1: "encoder alone", 2: "whole network"}


def plot_course(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss and mIoU against the training steps, both stages.

    Args:
        records: the lines of ``metrics.jsonl``.
        path: the picture, by its suffix (.png, .svg, .pdf); written atomically.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for stage, name in _STAGES.items():
        mine = [r for r in records if r["stage"] == stage]
        if not mine:
            continue
        left.plot([r["step"] for r in mine], [r["train_loss"] for r in mine], ".-", label=name)
        seen = [r for r in mine if r["val_miou"] is not None]
        right.plot([r["step"] for r in seen], [100 * r["val_miou"] for r in seen], ".-", label=name)
    left.set_ylabel("training loss")
    right.set_ylabel("mIoU on val, %")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_picture(figure, path)


def plot_frames(
    frames: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    path: Path,
    *,
    title: str | None = None,
) -> None:
    """Draws frames: the picture with its prediction over it, the prediction, the label.

    Args:
        frames: picture uint8 ``[H, W, 3]``, prediction and label uint8 ``[H, W]``, of each.
        class_names: for the legend.
        palette: a colour a class.
        path: the picture; written atomically.
        title: over the picture.

    Raises:
        ValueError: there are no frames.
        ImportError: matplotlib is missing.
    """
    if not frames:
        raise ValueError("plot_frames: frames must hold at least one, got none")
    height, width = frames[0][1].shape
    figure = new_figure(9, 0.8 + len(frames) * 3 * height / width)
    from matplotlib.patches import Patch

    grid = figure.subplots(len(frames), 3, squeeze=False)
    for row, (image, predicted, label) in zip(grid, frames, strict=True):
        shown = (
            overlay(image, predicted, palette),
            coloured(predicted, palette),
            coloured(label, palette),
        )
        for axes, picture in zip(row, shown, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
    for axes, name in zip(grid[0], ("overlay", "prediction", "label"), strict=True):
        axes.set_title(name, fontsize=9)
    handles = [
        Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=name)
        for name, colour in zip(class_names, palette, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
    if title:
        figure.suptitle(title)
    write_picture(figure, path)
