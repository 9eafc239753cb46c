"""factorized_conv2d composed of ATen's operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff.ops._aten_backward import convolution_backward
from pyeff.ops._conv_args import as_channels_last, empty_channels_last
from pyeff.ops._factorized_pair import BackwardCall, FactorPair, is_vertical_first


def activate(t: Tensor, name: str | None) -> Tensor:
    """The activation of that name, in place."""
    if name is None:
        return t
    if name == "relu":
        return t.relu_()
    activations: dict[str, Callable[..., Tensor]] = {
        "relu6": F.relu6,
        "silu": F.silu,
        "hardswish": F.hardswish,
    }
    return activations[name](t, inplace=True)


def forward(
    x: Tensor,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None],
    epilogue: tuple[Tensor | None, Tensor | None, Tensor | None],
    pair: FactorPair,
) -> Tensor:
    """y [N, F, H', W'], channels_last, without a gradient.

    Args:
        x: [N, C, H, W].
        first: Weight and bias of the first convolution.
        second: Of the second.
        epilogue: Scale, shift and residual.
        pair: The rest.
    """
    scale, shift, residual = epilogue
    y = _convolve(middle_map(x, *first, pair)[1], *second, not is_vertical_first(first[0]), pair)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, None, None], y, scale[:, None, None])
    elif scale is not None:
        y.mul_(scale[:, None, None])
    elif shift is not None:
        y.add_(shift[:, None, None])
    if residual is not None:
        y.add_(residual)
    return _channels_last(activate(y, pair.outer))


def middle_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: FactorPair
) -> tuple[Tensor, Tensor]:
    """The map between the two, before and after its activation (one tensor where that suffices).

    The derivatives of ReLU and ReLU6 follow from their results.
    """
    before = _convolve(as_channels_last(x), weight, bias, is_vertical_first(weight), pair)
    if pair.inner in (None, "relu", "relu6"):
        after = activate(before, pair.inner)
        return after, after
    return before, activate(before.clone(), pair.inner)


def backward(call: BackwardCall) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_first, b_first, w_second and b_second, those that are wanted."""
    grad, x, w_first, b_first, w_second, pair, wanted = call
    vertical = is_vertical_first(w_first)
    through = any(wanted[:3])
    grad, x = as_channels_last(grad), as_channels_last(x)
    before, after = middle_map(x, w_first, b_first, pair)
    grad_middle, grad_w_second, grad_b_second = convolve_backward(
        grad, after, w_second, not vertical, pair, (through, wanted[3], wanted[4])
    )
    if not through:
        return None, None, None, grad_w_second, grad_b_second
    del after
    grad_middle = activation_backward(grad_middle, before, pair.inner)
    del before
    firsts = convolve_backward(
        grad_middle, x, w_first, vertical, pair, (wanted[0], wanted[1], wanted[2])
    )
    return *firsts, grad_w_second, grad_b_second


def activation_backward(grad: Tensor, at: Tensor, name: str | None) -> Tensor:
    """grad times the derivative at ``at``, of relu and relu6 also at their result."""
    if name is None:
        return grad
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, at, 0)
    if name == "relu6":
        return torch.ops.aten.hardtanh_backward(grad, at, 0.0, 6.0)
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, at)
    return torch.ops.aten.hardswish_backward(grad, at)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, vertical: bool, pair: FactorPair
) -> Tensor:
    return F.conv2d(x, weight, bias, *pair.window(vertical))


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    vertical: bool,
    pair: FactorPair,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of one of the two convolutions."""
    return convolution_backward(grad, x, weight, pair.window(vertical), 1, wanted)


def _channels_last(y: Tensor) -> Tensor:
    out = empty_channels_last(y, *y.shape)
    return y if y.stride() == out.stride() else out.copy_(y)
