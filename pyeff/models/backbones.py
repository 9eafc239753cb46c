"""What the residual networks are: names, widths, depths and forms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Backbone:
    """A residual network, described.

    Attributes:
        name: the name it is known by.
        block: ``"basic"`` (two 3x3) or ``"bottleneck"`` (1x1, 3x3, 1x1; inner width a quarter).
        preactivation: norm and ReLU before each convolution and after the last block, or after
            each convolution.
        stem: ``"3x3"``, or ``"7x7"`` with stride 2, norm, ReLU and 3x3 max pooling of stride 2.
        stem_width: channels of the stem.
        widths: output channels of each stage.
        depths: blocks of each stage; every stage but the first starts with stride 2.
        shortcut: where the shape changes: ``"pad"`` (2x2 average pooling, new channels zero, no
            weights: option A) or ``"projection"`` (1x1 convolution).
        input_size: image size that it is made for, in pixels.
    """

    name: str
    block: str
    preactivation: bool
    stem: str
    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    shortcut: str
    input_size: int


def _cifar(name: str, depth: int) -> Backbone:
    blocks = (depth - 2) // 6
    widths = (16, 32, 64)
    return Backbone(name, "basic", True, "3x3", 16, widths, (blocks,) * 3, "pad", 32)


def _imagenet(name: str, block: str, depths: tuple[int, ...]) -> Backbone:
    widths = (64, 128, 256, 512) if block == "basic" else (256, 512, 1024, 2048)
    return Backbone(name, block, False, "7x7", 64, widths, depths, "projection", 224)


_ALL = [
    *(_cifar(f"resnet{depth}", depth) for depth in (8, 14, 20, 26, 32, 38, 44, 56, 110)),
    Backbone("resnet42", "basic", True, "3x3", 64, (64, 128, 256, 512), (5,) * 4, "pad", 32),
    Backbone("wrn32_4", "basic", True, "3x3", 16, (64, 128, 256), (5,) * 3, "pad", 32),
    Backbone("wrn28_10", "basic", True, "3x3", 16, (160, 320, 640), (4,) * 3, "projection", 32),
    _imagenet("resnet18", "basic", (2, 2, 2, 2)),
    _imagenet("resnet34", "basic", (3, 4, 6, 3)),
    _imagenet("resnet50", "bottleneck", (3, 4, 6, 3)),
]
BACKBONES = {backbone.name: backbone for backbone in _ALL}


def backbone_named(
    name: str,
    *,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    stem_width: int | None = None,
) -> Backbone:
    """The description of a network, with another width or depth if asked for.

    The CIFAR networks are pre-activation (as in the DVN authors' code), ``resnet8`` ... ``110``,
    ``resnet42`` (4 stages of 5 blocks, 64..512) and ``wrn32_4`` with option-A shortcuts,
    ``wrn28_10`` with projections. The ImageNet networks are post-activation with projections.

    Args:
        name: one of ``BACKBONES``.
        widths: output channels of each stage, instead of its own.
        depths: blocks of each stage, instead of its own.
        stem_width: channels of the stem; by default its own, or ``widths[0]`` where widths are
            given.

    Raises:
        ValueError: an unknown name, as many widths as there are not stages, sizes below 1.
    """
    if name not in BACKBONES:
        raise ValueError(
            f"backbone_named: backbone must be one of {', '.join(BACKBONES)}, got {name!r}"
        )
    found = BACKBONES[name]
    widths = found.widths if widths is None else tuple(widths)
    depths = found.depths if depths is None else tuple(depths)
    if stem_width is None:
        stem_width = found.stem_width if widths == found.widths else widths[0]
    if len(widths) != len(depths) or min((*widths, *depths, stem_width)) < 1:
        raise ValueError(
            "backbone_named: widths and depths must be positive and equally many, got "
            f"{widths} and {depths}"
        )
    if found.block == "bottleneck" and any(width % 4 for width in widths):
        raise ValueError(f"backbone_named: bottleneck widths must divide by 4, got {widths}")
    return replace(found, widths=widths, depths=depths, stem_width=stem_width)
