"""Deep Virtual Networks: several tasks, each at several memory budgets, in one set of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyeff.models.backbones import backbone_named
from pyeff.models.layout import layout_of
from pyeff.models.nested_resnet import NestedOptions, NestedResNet


class DVN(NestedResNet):
    """A deep virtual network; made by :func:`dvn`."""


def dvn(
    backbone: str,
    tasks: Mapping[str, int],
    levels: int,
    slice_mode: str = "full",
    *,
    start_units: Mapping[str, int] | None = None,
    in_channels: int = 3,
    stem: str | None = None,
    task_stems: bool | None = None,
    image_sizes: Mapping[str, int] | None = None,
    norm_affine: str = "private",
    norm_statistics: str = "private",
    unit_multiple: int = 1,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    stem_width: int | None = None,
) -> DVN:
    """Builds a deep virtual network.

    Every layer's channels fall into as many units as there are levels. Task i starts from unit i
    and takes further units by :func:`~pyeff.models.unit_order`, so that what is active is always an
    interval of channels. Each task has one classifier, shared (sliced) by its levels.

    Args:
        backbone: one of ``pyeff.models.BACKBONES``.
        tasks: classes of every task, by name; the order decides the start units.
        levels: number of levels and units k.
        slice_mode: ``"full"``: levels narrow the blocks and the stream between them (parameters
            about (l/k)^2); ``"inner"``: only the blocks' inner channels (about l/k); ``"grouped"``:
            as full, without weights between units (l/k; the full level is a grouped network).
        start_units: the unit that a task starts from, 1..levels; by default min(i, levels) for
            the i-th task.
        in_channels: channels of the images.
        stem: ``"3x3"``, ``"7x7"`` (stride 2, pooling) or ``"den"`` (7x7 with stride image size /
            32, norm, ReLU; a stem for each task); by default the backbone's.
        task_stems: whether every task has a stem of its own; by default only for ``"den"``.
        image_sizes: pixels of every task's images, for stem ``"den"``.
        norm_affine, norm_statistics: what has a scale and shift, and running statistics, of its
            own: ``"private"`` (every task and level), ``"task"`` or ``"shared"``.
        unit_multiple: sizes of units are multiples of this (8 or 16 suit the kernels).
        widths, depths, stem_width: another size of backbone, as in ``backbone_named``.

    Raises:
        ValueError: an unknown backbone, mode, stem or task name, sizes that do not fit.

    Source: Kim, Ahn, Torr, Oh, "Deep Virtual Networks for Memory Efficient Inference of Multiple
    Tasks", CVPR 2019. Which weights join two units, heads and norms are not in what could be read
    of it; they are choices of this library.

    Example:
        >>> import torch
        >>> model = dvn("resnet8", {"digits": 10, "parity": 2}, levels=4, in_channels=1)
        >>> model(torch.randn(2, 1, 8, 8), task="parity", level=2).shape
        torch.Size([2, 2])
    """
    config: dict[str, Any] = {
        "family": "dvn",
        "backbone": backbone,
        "tasks": dict(tasks),
        "levels": levels,
        "slice_mode": slice_mode,
        "start_units": None if start_units is None else dict(start_units),
        "in_channels": in_channels,
        "stem": stem,
        "task_stems": task_stems,
        "image_sizes": None if image_sizes is None else dict(image_sizes),
        "norm_affine": norm_affine,
        "norm_statistics": norm_statistics,
        "unit_multiple": unit_multiple,
        "widths": None if widths is None else list(widths),
        "depths": None if depths is None else list(depths),
        "stem_width": stem_width,
    }
    if slice_mode not in ("full", "inner", "grouped"):
        raise ValueError(
            f"dvn: slice_mode must be 'full', 'inner' or 'grouped', got {slice_mode!r}"
        )
    if levels < 1:
        raise ValueError(f"dvn: levels must be positive, got {levels}")
    for given in (start_units or {}), (image_sizes or {}):
        if unknown := set(given) - set(tasks):
            raise ValueError(
                f"dvn: start_units and image_sizes must name tasks of {list(tasks)}, got "
                f"{sorted(unknown)}"
            )
    described = backbone_named(backbone, widths=widths, depths=depths, stem_width=stem_width)
    stem = stem or described.stem
    starts = [min(i, levels) for i in range(1, len(tasks) + 1)]
    if start_units is not None:
        starts = [start_units.get(name, s) for name, s in zip(tasks, starts, strict=True)]
    options = NestedOptions(
        tasks={name: [classes] * levels for name, classes in tasks.items()},
        levels=levels,
        starts=starts,
        in_channels=in_channels,
        stem=stem,
        task_stems=stem == "den" if task_stems is None else task_stems,
        image_sizes=dict(image_sizes or {}),
        norm_affine=norm_affine,
        norm_statistics=norm_statistics,
        config=config,
    )
    return DVN(layout_of(described, levels, slice_mode, unit_multiple), options)
