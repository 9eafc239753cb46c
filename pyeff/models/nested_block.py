"""Residual blocks and stems of nested layers."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.layout import Active, BlockLayout, Layout
from pyeff.models.residual import ResidualBlock
from pyeff.models.resnet import StemPlan, conv_shapes, pad_amounts
from pyeff.nn import NestedBatchNorm2d, NestedConv2d, NestedMaskedConv2d
from pyeff.nn.pad_shortcut import pad_shortcut


@dataclass(frozen=True)
class NormOptions:
    """What all batch norms of a model have in common: see :class:`NestedBatchNorm2d`."""

    tasks: int
    levels: int
    affine: str = "private"
    statistics: str = "private"

    def build(self, channels: int, tasks: int | None = None) -> NestedBatchNorm2d:
        """A norm of that many channels."""
        return NestedBatchNorm2d(
            channels,
            self.tasks if tasks is None else tasks,
            self.levels,
            affine=self.affine,
            statistics=self.statistics,
        )


class NestedBlock(ResidualBlock):
    """A residual block of which the active channels of a layout run.

    Args:
        layout: the network's channels.
        block: this block's place in it.
        norms: what the batch norms have in common.
        masked: whether levels mask single weights (weight-connection learning).

    Attributes:
        conv_grids: for every convolution's name, the grids of its inputs and outputs.
        norm_grids: for every norm's name, its grid.
    """

    def __init__(
        self, layout: Layout, block: BlockLayout, norms: NormOptions, masked: bool = False
    ) -> None:
        backbone = layout.backbone
        shapes = conv_shapes(backbone.block, block.inputs, block.inner, block.outputs)
        super().__init__(len(shapes), backbone.preactivation, block.shortcut)
        self.layout, self.block = layout, block
        self.aligned = block.shortcut != "pad" or layout.pad_aligned(block)
        self.masked = masked
        self.conv_grids: dict[str, tuple[int, int]] = {}
        self.norm_grids: dict[str, int] = {}
        strided = "conv1" if backbone.block == "basic" else "conv2"
        for index, (name, inputs, outputs, kernel) in enumerate(shapes, 1):
            stride = block.stride if name == strided else 1
            self._add_conv(name, inputs, outputs, kernel, stride, norms.levels)
            self._add_norm(f"norm{index}", inputs if self.preactivation else outputs, norms)
        if block.shortcut == "projection":
            self._add_conv(
                "shortcut_conv", block.inputs, block.outputs, 1, block.stride, norms.levels
            )
            if not self.preactivation:
                self._add_norm("shortcut_norm", block.outputs, norms)

    def _add_conv(
        self, name: str, inputs: int, outputs: int, kernel: int, stride: int, levels: int
    ) -> None:
        grids = self.layout.grids
        shape = (grids[inputs].channels, grids[outputs].channels, kernel, stride, kernel // 2)
        self.conv_grids[name] = (inputs, outputs)
        if self.masked:
            setattr(self, name, NestedMaskedConv2d(*shape, bias=False, levels=levels))
        else:
            setattr(self, name, NestedConv2d(*shape, groups=self.layout.groups, bias=False))

    def _add_norm(self, name: str, grid: int, norms: NormOptions) -> None:
        self.norm_grids[name] = grid
        setattr(self, name, norms.build(self.layout.grids[grid].channels))

    def convolve(self, name: str, x: Tensor, active: Active) -> Tensor:
        """Runs the active part of the convolution called ``name``."""
        conv = getattr(self, name)
        if self.masked:
            return conv(x, active.level)
        inputs, outputs = self.conv_grids[name]
        return conv(x, active.ranges[inputs], active.ranges[outputs])

    def normalise(self, name: str, x: Tensor, active: Active) -> Tensor:
        """Runs the norm called ``name`` with the statistics of the active task and level."""
        channels = active.ranges[self.norm_grids[name]]
        return getattr(self, name)(x, active.task, active.level, channels)

    def pad(self, x: Tensor, active: Active) -> Tensor:
        """Runs the shortcut without weights."""
        if self.aligned:
            return pad_shortcut(x, self.block.stride, self.layout.pad_ratio(self.block))
        amounts = pad_amounts(self.layout, self.block, active.ranges)
        return pad_shortcut(x, self.block.stride, *amounts)


class NestedStem(nn.Module):
    """The layers before the first block; of one task, or shared by all.

    Args:
        plan: sizes of the full stem.
        grid: grid of its outputs.
        norms: what the batch norms have in common.
        own: whether it serves one task only (its norm then keeps one task's statistics).
    """

    def __init__(self, plan: StemPlan, grid: int, norms: NormOptions, own: bool) -> None:
        super().__init__()
        self.grid, self.own, self.pool = grid, own, plan.pool
        shape = (plan.inputs, plan.outputs, plan.kernel, plan.stride, plan.kernel // 2)
        self.conv = NestedConv2d(*shape, bias=False)
        self.norm = norms.build(plan.outputs, 1 if own else None) if plan.norm else None

    def forward(self, x: Tensor, active: Active) -> Tensor:
        """Maps images ``[N, C, H, W]`` to the first block's input."""
        channels = active.ranges[self.grid]
        x = self.conv(x, None, channels)
        if self.norm is not None:
            task = 0 if self.own else active.task
            x = F.relu(self.norm(x, task, active.level, channels), inplace=True)
        return F.max_pool2d(x, 3, 2, 1) if self.pool else x
