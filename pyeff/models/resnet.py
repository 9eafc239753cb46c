"""Plain residual networks of torch layers: the dense baseline, and what a level materialises to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.backbones import Backbone, backbone_named
from pyeff.models.layout import BlockLayout, Layout, layout_of
from pyeff.models.residual import ResidualBlock, global_pool
from pyeff.nn import Range
from pyeff.nn.pad_shortcut import pad_shortcut

# A block that is traced (pyeff.nn.Branches) shows this as one call.
torch.fx.wrap("pad_shortcut")


@dataclass(frozen=True)
class StemPlan:
    """The layers before the first block: sizes, and whether a norm with ReLU and a pool follow."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    norm: bool
    pool: bool


@dataclass(frozen=True)
class BlockPlan:
    """One block's channels; ``pad`` is (ratio, front, back) of :func:`pad_shortcut`."""

    inputs: int
    inner: int
    outputs: int
    stride: int
    groups: int
    shortcut: str
    pad: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """A plain network's sizes, layer by layer."""

    block: str
    preactivation: bool
    stem: StemPlan
    blocks: tuple[BlockPlan, ...]
    classes: int


def stem_plan(kind: str, inputs: int, outputs: int, image_size: int | None = None) -> StemPlan:
    """The stem called ``kind``.

    Args:
        kind: ``"3x3"``; ``"7x7"``: ImageNet's, stride 2 and pooling; ``"den"``: 7x7 with stride
            ``image_size // 32``, so that images of any size enter the body at 32 x 32 pixels.
        inputs, outputs: channels.
        image_size: pixels of the task's images, for ``"den"``.

    Raises:
        ValueError: an unknown kind; ``"den"`` without an image size of at least 32.
    """
    if kind == "3x3":
        return StemPlan(inputs, outputs, 3, 1, norm=False, pool=False)
    if kind == "7x7":
        return StemPlan(inputs, outputs, 7, 2, norm=True, pool=True)
    if kind == "den":
        if image_size is None or image_size < 32:
            raise ValueError(
                f"stem_plan: image_size must be at least 32 for stem 'den', got {image_size}"
            )
        return StemPlan(inputs, outputs, 7, image_size // 32, norm=True, pool=False)
    raise ValueError(f"stem_plan: stem must be '3x3', '7x7' or 'den', got {kind!r}")


def width(interval: Range) -> int:
    """Channels in [lo, hi)."""
    return interval[1] - interval[0]


def plan_of(
    layout: Layout,
    ranges: tuple[Range, ...],
    stem: StemPlan,
    classes: int,
    keep: Sequence[int] | None = None,
) -> Plan:
    """The sizes of a layout's network when only ``ranges`` are active.

    Args:
        layout: the network.
        ranges: active channels of every grid.
        stem: the full stem; its outputs are narrowed.
        classes: outputs of the classifier.
        keep: indices of the blocks that run; ``None`` for all.
    """
    blocks = []
    for index in range(len(layout.blocks)) if keep is None else keep:
        block = layout.blocks[index]
        inputs, outputs = ranges[block.inputs], ranges[block.outputs]
        groups = 1
        if layout.groups > 1:
            groups = layout.groups * width(inputs) // layout.grids[block.inputs].channels
        blocks.append(
            BlockPlan(
                width(inputs),
                width(ranges[block.inner]),
                width(outputs),
                block.stride,
                groups,
                block.shortcut,
                pad_amounts(layout, block, ranges) if block.shortcut == "pad" else (1, 0, 0),
            )
        )
    narrowed = StemPlan(
        stem.inputs, width(ranges[layout.stem]), stem.kernel, stem.stride, stem.norm, stem.pool
    )
    backbone = layout.backbone
    return Plan(backbone.block, backbone.preactivation, narrowed, tuple(blocks), classes)


def pad_amounts(
    layout: Layout, block: BlockLayout, ranges: tuple[Range, ...]
) -> tuple[int, int, int]:
    """(ratio, front, back) of a block's option-A shortcut: zeros where units are rounded apart."""
    ratio = layout.pad_ratio(block)
    (low_in, high_in), (low_out, high_out) = ranges[block.inputs], ranges[block.outputs]
    return ratio, ratio * low_in - low_out, high_out - ratio * high_in


def conv_shapes(
    block: str, inputs: int, inner: int, outputs: int
) -> list[tuple[str, int, int, int]]:
    """(name, in, out, kernel) of a block's convolutions; with grids in, grids come out."""
    if block == "basic":
        return [("conv1", inputs, inner, 3), ("conv2", inner, outputs, 3)]
    return [
        ("conv1", inputs, inner, 1),
        ("conv2", inner, inner, 3),
        ("conv3", inner, outputs, 1),
    ]


class PlainBlock(ResidualBlock):
    """A residual block of ``nn.Conv2d`` and ``nn.BatchNorm2d``."""

    def __init__(self, plan: BlockPlan, block: str, preactivation: bool) -> None:
        shapes = conv_shapes(block, plan.inputs, plan.inner, plan.outputs)
        super().__init__(len(shapes), preactivation, plan.shortcut)
        self.plan = plan
        strided = "conv1" if block == "basic" else "conv2"
        for index, (name, inputs, outputs, kernel) in enumerate(shapes, 1):
            stride = plan.stride if name == strided else 1
            conv = nn.Conv2d(
                inputs, outputs, kernel, stride, kernel // 2, groups=plan.groups, bias=False
            )
            setattr(self, name, conv)
            setattr(self, f"norm{index}", nn.BatchNorm2d(inputs if preactivation else outputs))
        if plan.shortcut == "projection":
            self.shortcut_conv = nn.Conv2d(
                plan.inputs, plan.outputs, 1, plan.stride, groups=plan.groups, bias=False
            )
            if not preactivation:
                self.shortcut_norm = nn.BatchNorm2d(plan.outputs)

    def convolve(self, name: str, x: Tensor, active: None) -> Tensor:
        """Runs the convolution called ``name``."""
        return getattr(self, name)(x)

    normalise = convolve

    def pad(self, x: Tensor, active: None) -> Tensor:
        """Runs the shortcut without weights."""
        return pad_shortcut(x, self.plan.stride, *self.plan.pad)


class PlainStem(nn.Module):
    """The layers before the first block."""

    def __init__(self, plan: StemPlan) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            plan.inputs, plan.outputs, plan.kernel, plan.stride, plan.kernel // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(plan.outputs) if plan.norm else None
        self.pool = plan.pool

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``[N, C, H, W]`` to the first block's input."""
        x = self.conv(x)
        if self.norm is not None:
            x = F.relu(self.norm(x), inplace=True)
        return F.max_pool2d(x, 3, 2, 1) if self.pool else x


class ResNet(nn.Module):
    """A residual network of plain torch layers, with the sizes that a plan gives.

    Args:
        plan: the sizes.
        config: keyword arguments of :func:`pyeff.models.build`, where it can rebuild the network;
            ``None`` for a materialised level.
    """

    def __init__(self, plan: Plan, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.config = config
        self.stem = PlainStem(plan.stem)
        self.blocks = nn.ModuleList(
            PlainBlock(block, plan.block, plan.preactivation) for block in plan.blocks
        )
        features = plan.blocks[-1].outputs
        self.norm = nn.BatchNorm2d(features) if plan.preactivation else None
        self.head = nn.Linear(features, plan.classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, H, W]``.

        Returns:
            Logits ``[N, classes]``.
        """
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if self.norm is not None:
            x = F.relu(self.norm(x), inplace=True)
        return self.head(global_pool(x))


def initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions (fan out), as residual networks are usually started."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_backbone(
    name: str,
    classes: int,
    *,
    in_channels: int = 3,
    stem: str | None = None,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    stem_width: int | None = None,
    image_size: int | None = None,
    preactivation: bool | None = None,
) -> ResNet:
    """A plain backbone: the dense network that a nested or branched one is compared with.

    Args:
        name: one of ``pyeff.models.BACKBONES``.
        classes: outputs of the classifier.
        in_channels: channels of the images.
        stem: ``"3x3"``, ``"7x7"`` or ``"den"``; by default the backbone's own.
        widths, depths, stem_width: as in :func:`backbone_named`.
        image_size: pixels, for stem ``"den"``.
        preactivation: norm and ReLU before each convolution (then also after the last block) or
            after it (then also after the stem); by default the backbone's own.

    Raises:
        ValueError: an unknown name or stem, sizes below 1.
    """
    config = {
        "family": "backbone",
        "name": name,
        "classes": classes,
        "in_channels": in_channels,
        "stem": stem,
        "widths": None if widths is None else list(widths),
        "depths": None if depths is None else list(depths),
        "stem_width": stem_width,
        "image_size": image_size,
        "preactivation": preactivation,
    }
    if classes < 1 or in_channels < 1:
        raise ValueError(
            f"build_backbone: classes and in_channels must be positive, got {classes} and "
            f"{in_channels}"
        )
    backbone: Backbone = backbone_named(name, widths=widths, depths=depths, stem_width=stem_width)
    first = stem_plan(stem or backbone.stem, in_channels, backbone.stem_width, image_size)
    if preactivation is not None:
        backbone = replace(backbone, preactivation=preactivation)
        first = replace(first, norm=first.norm or not preactivation)
    layout = layout_of(backbone)
    return ResNet(plan_of(layout, layout.full_ranges(), first, classes), config)
