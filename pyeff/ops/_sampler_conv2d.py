"""Convolutions that change the size of a map, with what stands beside and after them, as one call.

The CPU kernels behind layers in inference. They are no operators of their own: where anything but
the values is asked for (gradients, compilers, tracers, modes, other devices) a layer calls those of
PyTorch instead, and :func:`takes` says which of the two it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyeff import _C
from pyeff.ops._conv_args import Pair, as_channels_last, empty_channels_last, output_size
from pyeff.ops._dispatch import choose, forced_backend
from pyeff.ops._eager import is_plain
from pyeff.ops._factorized_pair import ACTIVATIONS
from pyeff.ops._packed import pack_line

OP = "sampler_conv2d"


class SamplerConv(NamedTuple):
    """A convolution as the kernels take it."""

    weight: Tensor  # [F, C, kh * kw, 1]
    packed: Tensor
    bias: Tensor | None  # [F]
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair | None  # of a transposed convolution; None for an ordinary one

    def output_size(self, x: Tensor) -> Pair:
        """(H', W') for the map ``x``."""
        height, width = (self._along(x.shape[2 + side], side) for side in (0, 1))
        return height, width

    def _along(self, size: int, side: int) -> int:
        kernel, stride, edge = self.kernel[side], self.stride[side], self.padding[side]
        if self.output_padding is None:
            return output_size(size, kernel, stride, edge, edge, self.dilation[side])
        reach = self.dilation[side] * (kernel - 1) + 1
        return (size - 1) * stride - 2 * edge + reach + self.output_padding[side]

    def problem(self, outer: str | None) -> tuple[int, ...]:
        """The integers of a call."""
        return (
            *self.kernel,
            int(self.output_padding is not None),
            ACTIVATIONS.index(outer),
            torch.get_num_threads(),
            *self.stride,
            *self.padding,
            *self.dilation,
        )


def prepare(
    conv: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, bias: Tensor | None
) -> SamplerConv | None:
    """The form of a convolution with other weights; None where the kernels cannot run it.

    Args:
        conv: What says how the kernel lies over the map.
        weight: In place of the layer's own, of the same shape.
        bias: Likewise.
    """
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros" or conv.groups != 1:
        return None
    if not weight.is_cpu or not weight.is_floating_point():
        return None
    transposed = isinstance(conv, nn.ConvTranspose2d)
    turned = weight.detach().transpose(0, 1) if transposed else weight.detach()
    flat = turned.flatten(2).unsqueeze(3).contiguous()
    return SamplerConv(
        flat,
        pack_line(flat),
        None if bias is None else bias.detach().contiguous(),
        _pair(conv.kernel_size),
        _pair(conv.stride),
        _pair(padding),
        _pair(conv.dilation),
        _pair(conv.output_padding) if transposed else None,
    )


def takes(conv: SamplerConv | None, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether the kernels run this call: plain eager tensors on a CPU that fit together.

    What does not fit is left to PyTorch, which says why. Gradients are the caller's affair.
    """
    if conv is None or not is_plain(x, conv.weight, conv.bias, residual) or not x.is_cpu:
        return False
    if forced_backend() not in (None, "cpp") or choose(OP, x) != "cpp":
        return False
    if x.dim() != 4 or x.dtype != conv.weight.dtype or x.shape[1] != conv.weight.shape[1]:
        return False
    size = conv.output_size(x)
    if min(*x.shape[2:], *size) < 1:
        return False
    shape = (x.shape[0], conv.weight.shape[0], *size)
    return residual is None or (residual.shape == shape and residual.dtype == x.dtype)


def convolve(
    conv: SamplerConv, x: Tensor, residual: Tensor | None = None, outer: str | None = None
) -> Tensor:
    """``outer(conv(x) + residual)``, channels_last, for a call that the kernels take."""
    y = empty_channels_last(x, x.shape[0], conv.weight.shape[0], *conv.output_size(x))
    if residual is not None:
        residual = as_channels_last(residual)
    _C.sampler_conv2d_forward(
        as_channels_last(x),
        conv.weight,
        conv.packed,
        conv.bias,
        residual,
        None,
        None,
        y,
        conv.problem(outer),
    )
    return y


def convolve_and_pool(
    conv: SamplerConv, x: Tensor, scale: Tensor, shift: Tensor, outer: str | None = None
) -> Tensor:
    """``outer(cat(conv(x), scale * pool(x) + shift))``, channels_last.

    Args:
        conv: Of stride 2 and as large a result as that of the pooling, which takes the largest of
            every 2 x 2 pixels, clipped at the border.
        x: ``[N, C, H, W]``, of a call that the kernels take.
        scale: ``[C]``.
        shift: ``[C]``.
        outer: Activation at the end.
    """
    channels = conv.weight.shape[0] + x.shape[1]
    y = empty_channels_last(x, x.shape[0], channels, *conv.output_size(x))
    _C.sampler_conv2d_forward(
        as_channels_last(x),
        conv.weight,
        conv.packed,
        conv.bias,
        None,
        scale,
        shift,
        y,
        conv.problem(outer),
    )
    return y


def _pair(value: tuple[int, ...]) -> Pair:
    return value[0], value[1]
