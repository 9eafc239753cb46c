"""The geometry that the launchers of nested_conv2d share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1

Selection = tuple[int, int] | Tensor  # (lo, hi), half open, or channel numbers, 1-D int64


class Side(NamedTuple):
    """The selected channels of one side of the layer; with numbers ``lo`` is unused."""

    lo: int
    size: int
    numbers: Tensor | None


class Layer(NamedTuple):
    """What all directions share; letters as in the kernels."""

    inputs: Side
    outputs: Side
    full_in: int
    full_out: int
    groups: int  # active ones
    C: int  # selected input channels of one active group
    K: int  # selected output channels of one active group
    R: int
    S: int
    window: tuple[int, ...]  # stride (h, w), padding (top, left), dilation (h, w)
    depthwise: bool

    @property
    def is_whole(self) -> bool:
        """Whether every element of the full weight is certain to be selected."""
        by_range = self.inputs.numbers is None and self.outputs.numbers is None
        return by_range and self.full_in == self.C and self.outputs.size == self.full_out

    @property
    def selection(self) -> tuple[int, int, int, int]:
        """in_lo, out_lo, full_in, full_out, in the order of the kernels' arguments."""
        return self.inputs.lo, self.outputs.lo, self.full_in, self.full_out


def nested_layer(
    weight_shape: Sequence[int],
    in_sel: Selection,
    out_sel: Selection,
    window: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
) -> Layer:
    """The layer for a full weight's shape, two selections, (stride, padding, dilation), groups."""
    inputs, outputs = side(in_sel), side(out_sel)
    full_out, full_in, R, S = weight_shape
    active = 1
    if groups > 1:
        active = inputs.size // full_in
        inputs = inputs._replace(lo=0)  # each group's rows of the weight hold its own channels only
    stride, padding, dilation = window
    return Layer(
        inputs,
        outputs,
        full_in,
        full_out,
        active,
        inputs.size // active,
        outputs.size // active,
        R,
        S,
        (*stride, padding[0], padding[2], *dilation),
        groups > 1 and full_in == 1,
    )


def side(selection: Selection) -> Side:
    """A selection in the form that the kernels take."""
    if isinstance(selection, Tensor):
        return Side(0, selection.numel(), selection.contiguous())
    lo, hi = selection
    return Side(lo, hi - lo, None)


def output_size(size: int, padding: int, taps: int, stride: int, dilation: int) -> int:
    """Pixels of the result along one side; ``padding`` is the sum of both ends."""
    return (size + padding - dilation * (taps - 1) - 1) // stride + 1


def empty_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device, channels_last."""
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
