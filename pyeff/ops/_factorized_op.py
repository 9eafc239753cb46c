"""factorized_conv2d as PyTorch sees it: registered operators, their shape rules and gradients."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyeff.ops import _factorized_backends as backends
from pyeff.ops._conv_args import empty_channels_last
from pyeff.ops._dispatch import forced_backend
from pyeff.ops._eager import needs_composition
from pyeff.ops._factorized_backends import Call, Tensors
from pyeff.ops._factorized_cpp import forward as cpp_forward
from pyeff.ops._factorized_pair import BackwardCall, FactorPair, taps_of
from pyeff.ops._factorized_torch import activation_backward
from pyeff.ops._register import register

# Their derivative follows from the result, which the next layer keeps as its input anyway.
_FROM_RESULT = ("relu", "relu6")


def run(tensors: Tensors, call: Call, *, plain: bool) -> Tensor:
    """The operator on checked arguments; ``plain``: nothing but autograd has to see the call."""
    pair = call.pair
    if not plain:
        if needs_composition():
            return backends.compose(tensors, pair)
        result: Tensor = forward_op(*tensors, *pair)
        return result
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if forced_backend() == "reference":
            return backends.by_reference(tensors, pair)
        y: Tensor = FactorizedConv2d.apply(*tensors, pair)
        return y
    if call.cpp is not None:
        return cpp_forward(call.cpp, *tensors)
    return backends.forward(tensors, pair)


def _forward_kernel(*args: Any) -> Tensor:
    return backends.forward(Tensors(*args[:8]), FactorPair(*args[8:]))


def _forward_fake(*args: Any) -> Tensor:
    tensors, pair = Tensors(*args[:8]), FactorPair(*args[8:])
    x, channels = tensors.x, tensors.w_second.shape[0]
    size = pair.output_size(x.shape, taps_of(tensors.w_first))
    return empty_channels_last(x, x.shape[0], channels, *size)


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    pair, wanted = FactorPair(args[0], args[1], args[2], args[3], None), args[4]
    call = BackwardCall(grad, x, w_first, b_first, w_second, pair, tuple(wanted))
    found = backends.backward(call)
    return tuple(
        x.new_empty(0) if g is None or not want else g if g.dim() != 4 else _settle(g, maps=i == 0)
        for i, (g, want) in enumerate(zip(found, wanted, strict=True))
    )


def _settle(grad: Tensor, *, maps: bool) -> Tensor:
    """Gradients of weights are contiguous and maps channels_last, as the shape rule says."""
    if not maps:
        return grad.contiguous()
    out = empty_channels_last(grad, *grad.shape)
    return grad if grad.stride() == out.stride() else out.copy_(grad)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    empty = (
        empty_channels_last(x, *x.shape),
        w_first.new_empty(w_first.shape),
        x.new_empty(w_first.shape[0]),
        w_second.new_empty(w_second.shape),
        x.new_empty(w_second.shape[0]),
    )
    return tuple(t if want else x.new_empty(0) for t, want in zip(empty, args[-1], strict=True))


# --- gradients ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_for_backward(ctx, Tensors(*inputs[:8]), FactorPair(*inputs[8:]), output)


def _save_for_backward(ctx: Any, tensors: Tensors, pair: FactorPair, y: Tensor) -> None:
    """The inputs that the backward reads, and y where its sign is all that is needed.

    Never the map between the convolutions, which the backward computes again.
    """
    ctx.pair = pair
    kept: list[Tensor | None] = list(tensors)
    if pair.outer is None or pair.outer in _FROM_RESULT:
        kept[-2:] = (None, None)
    ctx.save_for_backward(*kept, y if pair.outer in _FROM_RESULT else None)
    ctx.has = tuple(t is not None for t in tensors)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Of the eight tensors, each where it is needed."""
    *saved, y = ctx.saved_tensors
    tensors, pair = Tensors(*saved), ctx.pair
    need = tuple(a and b for a, b in zip(ctx.needs_input_grad[:8], ctx.has, strict=True))
    if torch.is_grad_enabled():
        return _twice_differentiable_gradients(grad_y, tensors, y, pair, need)
    if pair.outer in _FROM_RESULT:
        grad_y = activation_backward(grad_y, y, pair.outer)
    elif pair.outer is not None:
        before = forward_op(*tensors, *pair._replace(outer=None))
        grad_y = activation_backward(grad_y, before, pair.outer)
    return _gradients_before_outer(grad_y, tensors, pair, need)


def _gradients_before_outer(
    grad: Tensor, tensors: Tensors, pair: FactorPair, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """From the gradient of what the outer activation got.

    The scale goes into the second weight W and bias b before their convolution is reversed. With
    G the gradient of scale * W and s the sum of ``grad``, that of the scale is <W, G> + b * s.
    """
    x, w_first, b_first, w_second, b_second, scale, _, _ = tensors
    need_x, need_w1, need_b1, need_w2, need_b2, need_scale, need_shift, need_residual = need
    sums = need_b2 or need_shift or (need_scale and b_second is not None)
    wanted = (need_x, need_w1, need_b1, need_w2 or need_scale, sums)
    scaled = w_second if scale is None else w_second * scale[:, None, None, None]
    found: list[Tensor | None] = [None] * 5
    if any(wanted):
        arguments = (grad, x, w_first, b_first, scaled, *pair[:4], wanted)
        outcome = _backward_op(*arguments)
        found = [g if want else None for g, want in zip(outcome, wanted, strict=True)]
    grad_x, grad_w1, grad_b1, grad_scaled, summed = found
    grad_w2, grad_b2, grad_scale = grad_scaled if need_w2 else None, summed, None
    if scale is not None:
        if grad_w2 is not None:
            grad_w2 = grad_w2 * scale[:, None, None, None]
        if need_b2 and summed is not None:
            grad_b2 = summed * scale
    if need_scale and grad_scaled is not None:
        grad_scale = _inner_products(w_second, grad_scaled)
        if b_second is not None and summed is not None:
            grad_scale = grad_scale + b_second * summed
    return (
        grad_x,
        grad_w1,
        grad_b1,
        grad_w2,
        grad_b2 if need_b2 else None,
        grad_scale,
        summed if need_shift else None,
        grad if need_residual else None,
    )


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """[F] from two tensors [F, ...]; sums of half precision are in float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum((1, 2, 3)).to(a.dtype)


def _twice_differentiable_gradients(
    grad_y: Tensor, tensors: Tensors, y: Tensor | None, pair: FactorPair, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """By the reference, whose gradients autograd can differentiate again."""
    grads: list[Tensor | None] = [None] * 8
    if y is not None:  # the derivative of relu and relu6 is constant: a mask
        grad_y = activation_backward(grad_y, y.detach(), pair.outer)
        pair = pair._replace(outer=None)
    if pair.outer is None:  # a sum, whose terms were not kept
        grads[6] = grad_y.sum((0, 2, 3)) if need[6] else None
        grads[7] = grad_y if need[7] else None
        need = (*need[:6], False, False)
    leaves = {i: t for i, t in enumerate(tensors) if t is not None and need[i]}
    if leaves:
        result = backends.compose(tensors, pair)
        found = torch.autograd.grad(result, list(leaves.values()), grad_y, create_graph=True)
        for i, grad in zip(leaves, found, strict=True):
            grads[i] = grad
    return tuple(grads)


class FactorizedConv2d(torch.autograd.Function):
    """The eager route with gradients; ctx-style, since setup_context costs three times as much."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors, pair = Tensors(*args[:8]), args[8]
        recording = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        y = backends.forward(tensors, pair, recording=recording)
        _save_for_backward(ctx, tensors, pair, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad_y), None)


def _gradients_of_op(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_y), *[None] * 5)


# --- operations -----------------------------------------------------------------------------------


def _flops(*args: Any, out_shape: Any) -> int:
    return sum(_conv_flops(args[0], args[1], args[3], FactorPair(*args[8:])))


def _backward_flops(*args: Any, out_shape: Any) -> int:
    x, w_first, w_second, wanted = args[1], args[2], args[4], args[-1]
    first, second = _conv_flops(
        x, w_first, w_second, FactorPair(args[5], args[6], args[7], args[8], None)
    )
    through = any(wanted[:3])
    again = first * (through or wanted[3])  # the middle map
    return again + first * (wanted[0] + wanted[1]) + second * (through + wanted[3])


def _conv_flops(
    x: Sequence[int], w_first: Sequence[int], w_second: Sequence[int], pair: FactorPair
) -> tuple[int, int]:
    """2 per multiply-add of either convolution, from shapes."""
    taps = w_first[2] * w_first[3]
    middle = pair.middle_size(x, taps, w_first[3] == 1)
    result = pair.output_size(x, taps)
    return (
        2 * x[0] * prod(middle) * prod(w_first[:2]) * taps,
        2 * x[0] * prod(result) * prod(w_second[:2]) * taps,
    )


_PAIR_SCHEMA = "int stride, int padding, int dilation, str? inner"

forward_op = register(
    "factorized_conv2d(Tensor x, Tensor w_first, Tensor? b_first, Tensor w_second, "
    "Tensor? b_second, Tensor? scale, Tensor? shift, Tensor? residual, "
    f"{_PAIR_SCHEMA}, str? outer) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
    flops=_flops,
    backward=_gradients_of_op,
    setup_context=_save,
    autocast=True,
)
_backward_op = register(
    "factorized_conv2d_backward(Tensor grad, Tensor x, Tensor w_first, Tensor? b_first, "
    f"Tensor w_second, {_PAIR_SCHEMA}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    flops=_backward_flops,
)
