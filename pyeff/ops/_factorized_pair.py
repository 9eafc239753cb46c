"""How the two convolutions of a pair lie on the map, and what surrounds them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyeff.ops._conv_args import Pair, output_size

# Between the first and the last tap: more than any map has.
_FAR = 2**20
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")


class FactorPair(NamedTuple):
    """Everything but the tensors; one stride, padding and dilation for both axes."""

    stride: int
    padding: int
    dilation: int
    inner: str | None
    outer: str | None

    def output_size(self, x: Sequence[int], taps: int) -> Pair:
        """(H', W') for the shape [N, C, H, W] of x."""
        height, width = x[2:]
        return self._along(height, taps), self._along(width, taps)

    def middle_size(self, x: Sequence[int], taps: int, vertical: bool) -> Pair:
        """(height, width) of the map between the two; ``vertical`` says that the first one is."""
        height, width = x[2:]
        if vertical:
            return self._along(height, taps), width
        return height, self._along(width, taps)

    def window(self, vertical: bool) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation of one of the two, as conv2d takes them."""
        if vertical:
            return (self.stride, 1), (self.padding, 0), (self.dilation, 1)
        return (1, self.stride), (0, self.padding), (1, self.dilation)

    def with_taps_near(self, x: Sequence[int], taps: int) -> "FactorPair":
        """The same convolutions with a dilation no larger than it takes to miss the map.

        Only the middle tap meets a map of the shape ``x`` where the dilation is larger than its
        sides, whatever it is; ATen fails, or ends the process, near 2^31.
        """
        if self.dilation * (taps - 1) < _FAR:  # sizes may be symbols: not to be compared in vain
            return self
        beyond = self.padding - self.dilation * (taps // 2)  # what "same" would be
        enough = max(*x[2:], 1) + max(beyond, 0)
        if enough >= self.dilation:
            return self
        return self._replace(dilation=enough, padding=enough * (taps // 2) + beyond)

    def _along(self, size: int, taps: int) -> int:
        return output_size(size, taps, self.stride, self.padding, self.padding, self.dilation)


class BackwardCall(NamedTuple):
    """What the gradients of the two convolutions, and of the activation between them, come from.

    Attributes:
        grad: Gradient of the second convolution's result, [N, F, H', W'].
        x: [N, C, H, W].
        w_first: [L, C, n, 1] or [L, C, 1, n].
        b_first: [L] or None.
        w_second: [F, L, 1, n] or [F, L, n, 1], with the scale multiplied in.
        pair: The rest; ``outer`` plays no part.
        wanted: Of the gradients of x, w_first, b_first, w_second and b_second.
    """

    grad: Tensor
    x: Tensor
    w_first: Tensor
    b_first: Tensor | None
    w_second: Tensor
    pair: FactorPair
    wanted: tuple[bool, ...]


def taps_of(weight: Tensor) -> int:
    """n of a weight [O, I, n, 1] or [O, I, 1, n]."""
    return weight.shape[2] * weight.shape[3]


def is_vertical_first(w_first: Tensor) -> bool:
    """Whether the first one has its taps along the height; so has a pair of single taps."""
    return w_first.shape[3] == 1
