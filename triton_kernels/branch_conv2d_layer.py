"""The geometry that the launchers of branch_conv2d share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BranchLayer(NamedTuple):
    """What all directions share; letters as in the kernels."""

    branches: int  # B
    k: int  # routes of an image
    pairs: int  # N * k
    groups: int
    C: int  # input channels of one group
    K: int  # output channels of one group
    R: int
    S: int
    window: tuple[int, ...]  # stride (h, w), padding (top, left), dilation (h, w)

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel, which leaves nothing to multiply."""
        return self.groups > 1 and self.C == 1


def branch_layer(
    weight_shape: Sequence[int],
    index: Tensor,
    window: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
) -> BranchLayer:
    """The layer for a weight's shape, the routes [N, k], (stride, padding, dilation), groups."""
    branches, outputs, inputs, R, S = weight_shape
    stride, padding, dilation = window
    return BranchLayer(
        branches,
        index.shape[1],
        index.numel(),
        groups,
        inputs,
        outputs // groups,
        R,
        S,
        (*stride, padding[0], padding[2], *dilation),
    )


def empty_maps(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised ``[..., C, H, W]`` with C innermost in memory, like's dtype and device."""
    *outer, channels, height, width = shape
    maps = torch.empty(
        (*outer, height, width, channels), dtype=dtype or like.dtype, device=like.device
    )
    return maps.movedim(-1, -3)


def inputs_innermost(weight: Tensor) -> Tensor:
    """The stacked weight itself where its input channels lie side by side, else a copy."""
    if weight.stride(2) == 1 or weight.shape[2] == 1:
        return weight
    return empty_maps(weight.shape, weight).copy_(weight)


def map_strides(maps: Tensor) -> tuple[int, ...]:
    """Strides (n, j, c, h, w) of ``[N, k, C, H, W]``, or of ``[N, C, H, W]``, where j is 0."""
    if maps.dim() == 5:
        return maps.stride()
    n, *rest = maps.stride()
    return (n, 0, *rest)
