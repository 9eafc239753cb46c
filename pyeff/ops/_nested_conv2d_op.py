"""nested_conv2d as PyTorch sees it: registered operators, their shape rules and gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff.ops import _nested_conv2d_backends as backends
from pyeff.ops._conv_args import Sides, empty_channels_last
from pyeff.ops._nested_conv2d_backends import Conv
from pyeff.ops._register import register

# A Conv is lowered to what a schema can hold, and raised again inside.

_CONV_SCHEMA = (
    "SymInt in_lo, SymInt in_hi, SymInt out_lo, SymInt out_hi, Tensor? in_index, "
    "Tensor? out_index, int[2] stride, int[4] padding, int[2] dilation, int groups"
)


def lower(conv: Conv) -> tuple[Any, ...]:
    inputs, outputs = conv.in_selection, conv.out_selection
    in_index = inputs if isinstance(inputs, Tensor) else None
    out_index = outputs if isinstance(outputs, Tensor) else None
    return (
        *((0, inputs.shape[0]) if isinstance(inputs, Tensor) else inputs),
        *((0, outputs.shape[0]) if isinstance(outputs, Tensor) else outputs),
        in_index,
        out_index,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )


def _raise(
    in_lo: int,
    in_hi: int,
    out_lo: int,
    out_hi: int,
    in_index: Tensor | None,
    out_index: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Conv:
    sides: Sides = (padding[0], padding[1], padding[2], padding[3])
    return Conv(
        (in_lo, in_hi) if in_index is None else in_index,
        (out_lo, out_hi) if out_index is None else out_index,
        (stride[0], stride[1]),
        sides,
        (dilation[0], dilation[1]),
        groups,
    )


def _forward_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any) -> Tensor:
    return backends.forward(x, weight, bias, _raise(*conv))


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any) -> Tensor:
    return empty_channels_last(x, *_raise(*conv).output_shape(x, weight))


def _grad_input_kernel(
    grad_y: Tensor, weight: Tensor, height: int, width: int, *conv: Any
) -> Tensor:
    return backends.grad_input(grad_y, weight, height, width, _raise(*conv))


def _grad_input_fake(grad_y: Tensor, weight: Tensor, height: int, width: int, *conv: Any) -> Tensor:
    channels = backends.count(_raise(*conv).in_selection)
    return empty_channels_last(grad_y, grad_y.shape[0], channels, height, width)


def _grad_weight_kernel(
    grad_y: Tensor, x: Tensor, size: Sequence[int], strides: Sequence[int], *conv: Any
) -> Tensor:
    return backends.grad_weight(grad_y, x, tuple(size), tuple(strides), _raise(*conv))


def _grad_weight_fake(
    grad_y: Tensor, x: Tensor, size: Sequence[int], strides: Sequence[int], *conv: Any
) -> Tensor:
    return x.new_empty_strided(tuple(size), tuple(strides))


# --- gradients ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *conv = inputs
    _save_for_backward(ctx, x, weight, bias, _raise(*conv))


def _save_for_backward(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv
) -> None:
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None
    ctx.conv = conv


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where it is needed."""
    x, weight = ctx.saved_tensors
    conv: Conv = ctx.conv
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_bias = _grad_bias(grad_y, weight.shape[0], conv) if ctx.has_bias and need_bias else None
    if torch.is_grad_enabled():
        grads = _twice_differentiable_gradients(grad_y, x, weight, conv, need_x, need_weight)
        return (*grads, grad_bias)
    grad_x = grad_weight = None
    if need_x:
        grad_x = _grad_input_op(grad_y, weight, x.shape[2], x.shape[3], *lower(conv))
    if need_weight:
        grad_weight = _grad_weight_op(grad_y, x, weight.shape, weight.stride(), *lower(conv))
    return grad_x, grad_weight, grad_bias


def _grad_bias(grad_y: Tensor, channels: int, conv: Conv) -> Tensor:
    part = _sum_over_pixels(grad_y)
    if isinstance(conv.out_selection, Tensor):
        # On a GPU an index may lie outside: it takes part in nothing. The last place is for those.
        index = conv.out_selection
        index = index.where((index >= 0) & (index < channels), channels)
        return part.new_zeros(channels + 1).index_copy(0, index, part)[:channels]
    lo, hi = conv.out_selection
    return F.pad(part, (lo, channels - hi))


def _sum_over_pixels(grad_y: Tensor) -> Tensor:
    """[C] from [N, C, H, W]."""
    if not grad_y.is_cpu or grad_y.dtype not in (torch.float32, torch.float64):
        return grad_y.sum(dim=(0, 2, 3))
    # On the CPU a product with ones takes a seventh of the time of sum() in channels_last.
    rows = grad_y.permute(0, 2, 3, 1).reshape(-1, grad_y.shape[1])
    return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))


def _twice_differentiable_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, conv: Conv, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """By the reference, whose gradients autograd can differentiate again."""
    y = backends.compose(x, weight, None, conv)
    wanted = [t for t, need in ((x, need_x), (weight, need_weight)) if need]
    if not wanted:
        return None, None
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return (next(grads) if need_x else None, next(grads) if need_weight else None)


class NestedConv2d(torch.autograd.Function):
    """The eager route with gradients; ctx-style, since setup_context costs three times as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
        _save_for_backward(ctx, x, weight, bias, conv)
        return backends.forward(x, weight, bias, conv, recording=ctx.needs_input_grad[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad_y), None)


def _gradients_of_op(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_y), *[None] * 10)


def _flops(x: Any, weight: Any, bias: Any, *conv: Any, out_shape: Any) -> int:
    return _count_flops(out_shape, weight, conv)


def _grad_input_flops(grad_y: Any, weight: Any, *rest: Any, out_shape: Any) -> int:
    return _count_flops(grad_y, weight, rest[2:])


def _grad_weight_flops(grad_y: Any, x: Any, size: Any, *rest: Any, out_shape: Any) -> int:
    return _count_flops(grad_y, size, rest[1:])


def _count_flops(y: Sequence[int], weight: Sequence[int], conv: Sequence[Any]) -> int:
    """2 per multiply-add of the selected part; every direction costs the same."""
    in_lo, in_hi, *_, groups = conv
    in_channels = in_hi - in_lo if groups == 1 else weight[1]
    n, out_channels, height, width = y
    return 2 * n * out_channels * height * width * in_channels * weight[2] * weight[3]


forward_op = register(
    f"nested_conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV_SCHEMA}) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
    flops=_flops,
    backward=_gradients_of_op,
    setup_context=_save,
    autocast=True,
)
_grad_input_op = register(
    f"nested_conv2d_grad_input(Tensor grad_y, Tensor weight, SymInt height, SymInt width, "
    f"{_CONV_SCHEMA}) -> Tensor",
    kernel=_grad_input_kernel,
    fake=_grad_input_fake,
    flops=_grad_input_flops,
)
_grad_weight_op = register(
    f"nested_conv2d_grad_weight(Tensor grad_y, Tensor x, SymInt[] size, SymInt[] strides, "
    f"{_CONV_SCHEMA}) -> Tensor",
    kernel=_grad_weight_kernel,
    fake=_grad_weight_fake,
    flops=_grad_weight_flops,
)
