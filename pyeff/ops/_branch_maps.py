"""Maps of images and of (image, branch) pairs: layout and the kernel's place on them."""

from typing import NamedTuple

from torch import Tensor

from pyeff.ops._conv_args import Pair, Sides, output_size


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


def map_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of [..., C, H, W] with C innermost in memory."""
    *outer, c, h, w = shape
    strides = [h * w * c]
    for size in reversed(outer[1:]):
        strides.insert(0, strides[0] * size)
    return (*strides, 1, w * c, c)


def empty_maps(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised [..., C, H, W] with C innermost in memory."""
    return like.new_empty_strided(shape, map_strides(shape))


def channels_innermost(t: Tensor) -> Tensor:
    """``t`` [..., C, H, W] itself where its channels lie side by side, else a copy."""
    if t.stride(-3) == 1 or t.shape[-3] == 1:
        return t
    return empty_maps(t, *t.shape).copy_(t)
