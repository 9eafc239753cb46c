"""The algebra of linear convolutions: stacked ones and parallel ones become a single one.

Everything that contracts does it through these functions: expanded layers, their training in
contracted form, branches that are summed. They are differentiable, twice, and work in the dtype of
what they are given.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]
Shape = tuple[int, int, int, int]  # of a weight: outputs, inputs of a group, taps


@dataclass(frozen=True)
class Kernel:
    """A convolution without its padding.

    Attributes:
        weight: ``[O, I / groups, kh, kw]``.
        bias: ``[O]`` or ``None``.
        stride: of the two axes.
        dilation: of the two axes; without a meaning where a kernel has one tap.
        groups: that the channels form.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype | None = None) -> "Kernel":
        """The kernel of a layer: its own tensors, or copies in ``dtype``."""
        weight, bias = conv.weight, conv.bias
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return cls(weight, bias, _pair(conv.stride), _pair(conv.dilation), conv.groups)

    @property
    def taps(self) -> Pair:
        """Taps along the two axes."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        out_channels, in_channels, height, width = self.weight.shape
        return out_channels, in_channels, height, width

    def to(self, dtype: torch.dtype) -> "Kernel":
        """The same kernel in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)


def compose(first: Kernel, second: Kernel) -> Kernel:
    """One convolution that equals ``second(first(x))``.

    With ``s`` the stride of the first, along each axis::

        W[o, i, u] = sum_p sum_a W2[o, p, a] * W1[p, i, u - s * a]
        b[o] = b2[o] + sum_p (sum_a W2[o, p, a]) * b1[p]

    The equality holds at the borders too, if only the first pads: whatever the second padded with
    would not have passed the first. Dilations may differ; the result has their greatest common
    divisor, counted in pixels of the input.

    Args:
        first: takes the input.
        second: takes what the first gives; its own padding is 0.

    Returns:
        The kernel, with a bias where either has one, in the dtype of the weights.

    Raises:
        ValueError: different groups, or channels that do not fit.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020, section 3.
    """
    _check_stacked(first, second)
    groups = first.groups
    spread, steps, gaps = _lattice(first, second)
    w1 = first.weight.unflatten(0, (groups, -1))  # [g, P, I, *k1]
    w2 = second.weight.unflatten(0, (groups, -1))  # [g, O, P, *k2]
    # The products of all taps: [g, O * k2, P] @ [g, P, I * k1] -> [g, O * k2, I * k1].
    products = w2.permute(0, 1, 3, 4, 2).flatten(1, 3) @ w1.flatten(2)
    products = products.unflatten(1, (w2.shape[1], prod(second.taps))).flatten(0, 1)
    if second.taps == (1, 1):
        weight = products.flatten(1).unflatten(1, (w1.shape[2], *first.taps))
    elif first.taps == (1, 1):
        weight = products.mT.unflatten(2, second.taps)
    else:
        # Each tap of the second adds a copy of the first's kernel, `steps` further on.
        taps = composed_taps(first, second)
        weight = F.fold(products.mT, taps, first.taps, gaps, 0, steps)
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return Kernel(weight, _composed_bias(first, w2, second.bias), stride, spread, groups)


def _composed_bias(first: Kernel, w2: Tensor, b2: Tensor | None) -> Tensor | None:
    if first.bias is None:
        return b2
    passed = w2.sum((3, 4)) @ first.bias.unflatten(0, (first.groups, -1, 1))  # [g, O, 1]
    return passed.flatten() if b2 is None else b2 + passed.flatten()


def composed_taps(first: Kernel, second: Kernel) -> Pair:
    """Taps of the kernel that :func:`compose` gives."""
    _, steps, gaps = _lattice(first, second)
    height, width = (
        gap * (k1 - 1) + step * (k2 - 1) + 1
        for gap, k1, step, k2 in zip(gaps, first.taps, steps, second.taps, strict=True)
    )
    return height, width


def compose_all(kernels: Sequence[Kernel]) -> Kernel:
    """One convolution that equals all of a chain, whose members run in the order given.

    Left to right or right to left, whichever multiplies less.

    Args:
        kernels: one at least; only the first may pad.

    Raises:
        ValueError: as :func:`compose`; an empty chain.
    """
    if not kernels:
        raise ValueError("compose_all: kernels must be one at least, got none")
    if len(kernels) > 2:
        forward, backward = _fold_macs([kernel.shape for kernel in kernels])
        if backward < forward:
            return reduce(lambda second, first: compose(first, second), reversed(kernels))
    return reduce(compose, kernels)


def composition_macs(shapes: Sequence[Shape]) -> int:
    """Multiply-adds that :func:`compose_all` needs for the weight, with strides and dilations 1.

    Args:
        shapes: of the kernels' weights.
    """
    return min(_fold_macs(shapes))


def _fold_macs(shapes: Sequence[Shape]) -> Pair:
    """Multiply-adds of a chain's composition from its start and from its end."""
    forward = backward = 0
    joined = shapes[0]
    for shape in shapes[1:]:
        forward += _pair_macs(joined, shape)
        joined = _joined(joined, shape)
    joined = shapes[-1]
    for shape in reversed(shapes[:-1]):
        backward += _pair_macs(shape, joined)
        joined = _joined(shape, joined)
    return forward, backward


def _pair_macs(first: Shape, second: Shape) -> int:
    """Every number of the second with all that one output of the first is made of."""
    return prod(second) * prod(first[1:])


def _joined(first: Shape, second: Shape) -> Shape:
    return second[0], first[1], first[2] + second[2] - 1, first[3] + second[3] - 1


def compose_linear(
    first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """One affine map that equals ``second(first(x))``: ``W = W2 W1``, ``b = b2 + W2 b1``.

    Args:
        first, second: weight ``[O, I]`` and bias ``[O]`` or ``None``.

    Raises:
        ValueError: features that do not fit.
    """
    (w1, b1), (w2, b2) = first, second
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(
            f"compose_linear: second must take the {w1.shape[0]} features of the first, got "
            f"{w2.shape[1]}"
        )
    if b1 is None:
        return w2 @ w1, b2
    passed = w2 @ b1
    return w2 @ w1, passed if b2 is None else b2 + passed


def add_parallel(kernels: Sequence[Kernel]) -> Kernel:
    """One convolution that equals the sum of several that see the same input.

    Smaller kernels stand in the middle of the largest. So the sum is that of branches whose
    paddings are ``p - dilation * ((k - k_branch) // 2)``, with k and p those of the result.

    Args:
        kernels: one at least, with the same channels, stride and groups, the same dilation where
            they have more than one tap, and taps that differ by even numbers.

    Raises:
        ValueError: an empty sum, or kernels that have no common one.
    """
    if not kernels:
        raise ValueError("add_parallel: kernels must be one at least, got none")
    first = kernels[0]
    taps = (max(k.taps[0] for k in kernels), max(k.taps[1] for k in kernels))
    dilation = (_common_dilation(kernels, 0), _common_dilation(kernels, 1))
    for kernel in kernels:
        for name, ours, theirs in (
            ("groups", first.groups, kernel.groups),
            ("stride", first.stride, kernel.stride),
            ("channels", first.shape[:2], kernel.shape[:2]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"add_parallel: kernels must have the same {name}, got {ours} and {theirs}"
                )
    weight = torch.stack([centre_taps(kernel, taps).weight for kernel in kernels]).sum(0)
    biases = [kernel.bias for kernel in kernels if kernel.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return Kernel(weight, bias, first.stride, dilation, first.groups)


def _common_dilation(kernels: Sequence[Kernel], axis: int) -> int:
    found = {kernel.dilation[axis] for kernel in kernels if kernel.taps[axis] > 1}
    if len(found) > 1:
        raise ValueError(f"add_parallel: kernels must have the same dilation, got {sorted(found)}")
    return found.pop() if found else 1


def centre_taps(kernel: Kernel, taps: Pair) -> Kernel:
    """The kernel with zeros around it, ``taps`` in all.

    Args:
        kernel: the smaller one.
        taps: larger by an even number along each axis, or the same.

    Raises:
        ValueError: it would not stand in the middle.
    """
    more = [new - old for new, old in zip(taps, kernel.taps, strict=True)]
    if min(more) < 0 or any(extra % 2 for extra in more):
        raise ValueError(f"centre_taps: taps must exceed {kernel.taps} by even numbers, got {taps}")
    height, width = (extra // 2 for extra in more)
    return replace(kernel, weight=F.pad(kernel.weight, (width, width, height, height)))


def scale_outputs(kernel: Kernel, scale: Tensor, shift: Tensor) -> Kernel:
    """One convolution that equals ``scale * kernel(x) + shift``: what a folded norm is.

    Args:
        kernel: any.
        scale, shift: ``[O]``, in the dtype of the weight.
    """
    bias = shift if kernel.bias is None else shift + scale * kernel.bias
    return replace(kernel, weight=scale[:, None, None, None] * kernel.weight, bias=bias)


def identity_kernel(like: Kernel, channels: int) -> Kernel:
    """The 1 x 1 convolution that gives what it takes, with the groups and stride of ``like``.

    Args:
        like: gives groups, stride, dtype and device.
        channels: a multiple of the groups.

    Raises:
        ValueError: channels that the groups do not divide.
    """
    if channels < 1 or channels % like.groups:
        raise ValueError(
            f"identity_kernel: channels must be a multiple of the {like.groups} groups, got "
            f"{channels}"
        )
    per_group = channels // like.groups
    one = torch.eye(per_group, dtype=like.weight.dtype, device=like.weight.device)
    weight = one.repeat(like.groups, 1)[:, :, None, None]
    return Kernel(weight, None, like.stride, (1, 1), like.groups)


def without_autocast(weight: Tensor) -> AbstractContextManager[object]:
    """Within it weights are composed in their own dtype.

    Autocast would round the weight at every step of the composition.
    """
    device = weight.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _lattice(first: Kernel, second: Kernel) -> tuple[Pair, Pair, Pair]:
    """Of the composed kernel: its dilation, and in units of it the steps of the two kernels' taps.

    A tap of the second lies ``s1 * d2`` pixels of the input from the next, one of the first ``d1``.
    """

    def along(axis: int) -> tuple[int, int, int]:
        far = first.stride[axis] * second.dilation[axis] if second.taps[axis] > 1 else 0
        near = first.dilation[axis] if first.taps[axis] > 1 else 0
        spread = gcd(far, near) or 1
        return spread, max(far // spread, 1), max(near // spread, 1)

    (spread_y, step_y, gap_y), (spread_x, step_x, gap_x) = along(0), along(1)
    return (spread_y, spread_x), (step_y, step_x), (gap_y, gap_x)


def _check_stacked(first: Kernel, second: Kernel) -> None:
    if first.groups != second.groups:
        raise ValueError(
            f"compose: second must have the groups of the first, {first.groups}, got "
            f"{second.groups}"
        )
    given, taken = first.shape[0], second.shape[1] * second.groups
    if given != taken:
        raise ValueError(
            f"compose: second must take the {given} channels of the first, got {taken}"
        )


def _pair(values: Sequence[int]) -> Pair:
    height, width = values
    return height, width
