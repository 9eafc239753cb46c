"""NestedNet: one task at several levels, each of which contains the level below."""

from collections.abc import Sequence
from typing import Any

from pyeff.models.backbones import backbone_named
from pyeff.models.layout import Layout, layout_of
from pyeff.models.nested_resnet import NestedOptions, NestedResNet
from pyeff.nn import LevelMask

STRATEGIES = ("channel", "layer", "weight")


class NestedNet(NestedResNet):
    """A nested network; made by :func:`nestednet`.

    Attributes:
        densities: for the strategy ``"weight"``, the share of weights that each level ends with;
            ``None`` for the others.
    """

    def __init__(
        self, layout: Layout, options: NestedOptions, densities: Sequence[float] | None = None
    ) -> None:
        super().__init__(layout, options)
        self.densities = None if densities is None else list(densities)

    def step(self, progress: float) -> None:
        """Moves the masks of weight-connection learning along; the training loop calls it.

        Every level's share of weights falls from 1 to its target ``d`` as
        ``d + (1 - d) (1 - progress)^3``, and the largest weights of the moment are kept, each
        level's within those of the next. For the other strategies there is nothing to do.

        Args:
            progress: how much of the pruning phase is over; from 1 on the targets hold.

        Raises:
            ValueError: a negative progress.

        Source: the cubic schedule of Zhu, Gupta, "To prune, or not to prune", 2017. NestedNet's
        own schedule is not in what could be read of it.
        """
        if progress < 0:
            raise ValueError(f"NestedNet: progress must be at least 0, got {progress}")
        if self.densities is None:
            return
        left = (1 - min(progress, 1.0)) ** 3
        shares = [density + (1 - density) * left for density in self.densities]
        for module in self.blocks.modules():
            if isinstance(module, LevelMask):
                module.set_density(shares)


def nestednet(
    backbone: str,
    classes: int | Sequence[int],
    levels: int,
    strategy: str = "channel",
    *,
    level_heads: bool | None = None,
    block_levels: Sequence[int] | None = None,
    densities: Sequence[float] | None = None,
    task: str = "main",
    in_channels: int = 3,
    stem: str | None = None,
    image_size: int | None = None,
    norm_affine: str = "private",
    norm_statistics: str = "private",
    unit_multiple: int = 1,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    stem_width: int | None = None,
) -> NestedNet:
    """Builds a nested network.

    Args:
        backbone: one of ``pyeff.models.BACKBONES``.
        classes: number of classes; or one for each level, say coarse classes at the core and fine
            ones at the full level, each level with a classifier of its own then.
        levels: number of levels.
        strategy: ``"channel"``: a level uses the first channels of every layer (a DVN with one
            task); ``"layer"``: a level uses some of the blocks, at full width; ``"weight"``: a
            level uses some of the weights of every convolution in the blocks, the largest ones
            (call :meth:`NestedNet.step` in training).
        level_heads: whether every level has a classifier of its own; by default only where classes
            differ.
        block_levels: for ``"layer"``, the first level that runs each block; by default equal
            shares, lower levels first within each stage. Blocks that change the shape are at
            level 1.
        densities: for ``"weight"``, the share of weights of each level; by default l / levels.
        task: the name of the only task.
        in_channels, stem, image_size, norm_affine, norm_statistics, unit_multiple, widths, depths,
            stem_width: as in :func:`~pyeff.models.dvn`.

    Raises:
        ValueError: an unknown strategy, an option of another strategy, sizes that do not fit.

    Source: Kim, Ahn, Oh, "NestedNet: Learning Nested Sparse Structures in Deep Neural Networks",
    CVPR 2018.

    Example:
        >>> import torch
        >>> model = nestednet("resnet20", [20, 100, 100], levels=3, strategy="layer")
        >>> model(torch.randn(2, 3, 32, 32), level=1).shape
        torch.Size([2, 20])
    """
    per_level = [classes] * levels if isinstance(classes, int) else list(classes)
    config: dict[str, Any] = {
        "family": "nestednet",
        "backbone": backbone,
        "classes": classes if isinstance(classes, int) else per_level,
        "levels": levels,
        "strategy": strategy,
        "level_heads": level_heads,
        "block_levels": None if block_levels is None else list(block_levels),
        "densities": None if densities is None else list(densities),
        "task": task,
        "in_channels": in_channels,
        "stem": stem,
        "image_size": image_size,
        "norm_affine": norm_affine,
        "norm_statistics": norm_statistics,
        "unit_multiple": unit_multiple,
        "widths": None if widths is None else list(widths),
        "depths": None if depths is None else list(depths),
        "stem_width": stem_width,
    }
    _check_strategy(strategy, levels, block_levels, densities)
    described = backbone_named(backbone, widths=widths, depths=depths, stem_width=stem_width)
    mode, units = ("full", levels) if strategy == "channel" else ("none", 1)
    layout = layout_of(described, units, mode, unit_multiple)
    differ = len(set(per_level)) > 1
    if differ and level_heads is False:
        raise ValueError(
            f"nestednet: level_heads must not be False where classes differ, got {per_level}"
        )
    options = NestedOptions(
        tasks={task: per_level},
        levels=levels,
        starts=[1],
        in_channels=in_channels,
        stem=stem or described.stem,
        image_sizes={} if image_size is None else {task: image_size},
        level_heads=differ if level_heads is None else level_heads,
        norm_affine=norm_affine,
        norm_statistics=norm_statistics,
        masked=strategy == "weight",
        block_levels=schedule_blocks(layout, levels, block_levels) if strategy == "layer" else None,
        config=config,
    )
    if strategy == "weight" and densities is None:
        densities = [level / levels for level in range(1, levels + 1)]
    return NestedNet(layout, options, densities)


def _check_strategy(
    strategy: str,
    levels: int,
    block_levels: Sequence[int] | None,
    densities: Sequence[float] | None,
) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"nestednet: strategy must be one of {STRATEGIES}, got {strategy!r}")
    if levels < 1:
        raise ValueError(f"nestednet: levels must be positive, got {levels}")
    if block_levels is not None and strategy != "layer":
        raise ValueError(f"nestednet: block_levels must go with strategy 'layer', got {strategy!r}")
    if densities is None:
        return
    if strategy != "weight":
        raise ValueError(f"nestednet: densities must go with strategy 'weight', got {strategy!r}")
    shares = list(densities)
    if len(shares) != levels or shares != sorted(shares) or shares[0] <= 0 or shares[-1] > 1:
        raise ValueError(
            f"nestednet: densities must be {levels} rising shares in (0, 1], got {shares}"
        )


def schedule_blocks(layout: Layout, levels: int, given: Sequence[int] | None = None) -> list[int]:
    """The first level that runs each block (layer scheduling).

    Args:
        layout: the network.
        levels: number of levels.
        given: the answer to check, instead of equal shares.

    Raises:
        ValueError: fewer blocks that may be skipped than levels above the first; given levels that
            are out of range, not one for each block, above 1 for a block that changes the shape, or
            with a level that adds no block.
    """
    fixed = [block.shortcut != "identity" for block in layout.blocks]
    if given is not None:
        first = list(given)
        if len(first) != len(fixed) or not all(1 <= level <= levels for level in first):
            raise ValueError(
                f"nestednet: block_levels must be {len(fixed)} levels in 1..{levels}, got {first}"
            )
        if any(stays and level != 1 for stays, level in zip(fixed, first, strict=True)):
            raise ValueError(
                "nestednet: block_levels must be 1 for the blocks that change the shape "
                f"{[i for i, stays in enumerate(fixed) if stays]}, got {first}"
            )
        if missing := set(range(2, levels + 1)) - set(first):
            raise ValueError(
                f"nestednet: block_levels must use every level above 1, got none at "
                f"{sorted(missing)}"
            )
        return first
    depth = 0
    places = []
    for index, stays in enumerate(fixed):
        depth = 0 if stays else depth + 1
        if not stays:
            places.append((depth, index))
    free = len(places)
    if free < levels - 1:
        raise ValueError(
            f"nestednet: levels must be at most {free + 1} for {free} blocks that may be skipped, "
            f"got {levels}"
        )
    first = [1] * len(fixed)
    for rank, (_, index) in enumerate(sorted(places)):
        first[index] = levels - (free - 1 - rank) * levels // max(free, levels)
    return first
