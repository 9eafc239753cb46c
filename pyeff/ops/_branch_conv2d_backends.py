"""The backends of branch_conv2d, each with a forward, an input and a weight gradient."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff.ops._conv_args import Pair, Sides, output_size

OP = "branch_conv2d"


class Conv(NamedTuple):
    """Where the kernel lies; padding is (top, bottom, left, right)."""

    stride: Pair
    padding: Sides
    dilation: Pair
    groups: int

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """(H', W') for x [..., H, W] and weight [..., kh, kw]."""
        top, bottom, left, right = self.padding
        (height, width), (kernel_h, kernel_w) = x.shape[-2:], weight.shape[-2:]
        return (
            output_size(height, kernel_h, self.stride[0], top, bottom, self.dilation[0]),
            output_size(width, kernel_w, self.stride[1], left, right, self.dilation[1]),
        )


def empty_maps(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised [..., C, H, W] with C innermost in memory."""
    *outer, c, h, w = shape
    strides = [h * w * c]
    for size in reversed(outer[1:]):
        strides.insert(0, strides[0] * size)
    return like.new_empty_strided(shape, (*strides, 1, w * c, c))


def compose(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv) -> Tensor:
    """Gathered weights and one grouped convolution: differentiable in every way by PyTorch."""
    n, k = index.shape
    if x.dim() == 4:
        x = x.unsqueeze(1).expand(-1, k, -1, -1, -1)
    top, bottom, left, right = conv.padding
    padding = (top, left)
    if top != bottom or left != right:
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    branches = index.reshape(-1).long()
    kernels = weight[branches].flatten(0, 1)
    if n * k == 0:  # a convolution must have at least one group
        y = F.conv2d(
            x.flatten(0, 1), weight[0], None, conv.stride, padding, conv.dilation, conv.groups
        )
        return y.unflatten(0, (n, k))
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[-2:]),
        kernels,
        None if bias is None else bias[branches].flatten(),
        conv.stride,
        padding,
        conv.dilation,
        n * k * conv.groups,
    )
    return y.reshape(n, k, -1, *y.shape[-2:])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv) -> Tensor:
    """y [N, k, O, H', W'], O innermost."""
    y = compose(x, weight, bias, index, conv)
    out = empty_maps(y, *y.shape)
    return (
        out.copy_(y)
        if not torch.is_grad_enabled()
        else y.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    )
