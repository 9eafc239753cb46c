"""branch_conv2d as PyTorch sees it: registered operators, their shape rules and gradients."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyeff.ops import _branch_conv2d_backends as backends
from pyeff.ops._branch_conv2d_backends import Call
from pyeff.ops._branch_conv2d_torch import compose
from pyeff.ops._branch_index import check_known_values, kernel_index
from pyeff.ops._branch_maps import Conv, empty_maps
from pyeff.ops._dispatch import forced_backend
from pyeff.ops._eager import needs_composition
from pyeff.ops._packed import packed_weight
from pyeff.ops._register import register

_CONV_SCHEMA = "int[2] stride, int[4] padding, int[2] dilation, int groups"


def run(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    call: Call,
    *,
    plain: bool,
    owner: Tensor | None = None,
) -> Tensor:
    """The operator on checked arguments, by the shortest route that is open.

    ``op`` is named where a value of the index is wrong; ``plain`` says that nothing but autograd
    has to see the call; ``owner`` is the tensor that ``weight`` is a view of, if any.
    """
    conv = call.conv
    if not plain:
        if needs_composition():
            check_known_values(op, index, weight.shape[0])
            return compose(x, weight, bias, index, conv)
        result: Tensor = forward_op(x, weight, bias, index, *conv)
        return result
    index = kernel_index(op, index, weight.shape[0])
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if forced_backend() == "reference":
            return backends.by_reference(x, weight, bias, index, conv)
        y: Tensor = BranchConv2d.apply(x, weight, bias, index, conv)
        return y
    if call.cpp is not None:
        packed = packed_weight(weight if owner is None else owner, conv.groups)
        return backends.cpp_forward(call.cpp, x, weight, packed, bias, index)
    return backends.forward(x, weight, bias, index, conv)


def _raise(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Conv:
    """The Conv that was lowered to what a schema can hold."""
    return Conv(
        (stride[0], stride[1]),
        (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[1]),
        groups,
    )


# Compiled graphs call these with values that no check has seen, hence kernel_index.


def _forward_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *conv: Any
) -> Tensor:
    index = kernel_index(backends.OP, index, weight.shape[0])
    return backends.forward(x, weight, bias, index, _raise(*conv))


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *conv: Any
) -> Tensor:
    return empty_maps(x, *index.shape, weight.shape[1], *_raise(*conv).output_size(x, weight))


def _grad_input_kernel(
    grad_y: Tensor, weight: Tensor, index: Tensor, shape: Sequence[int], *conv: Any
) -> Tensor:
    index = kernel_index(backends.OP, index, weight.shape[0])
    return backends.grad_input(grad_y, weight, index, tuple(shape), _raise(*conv))


def _grad_input_fake(
    grad_y: Tensor, weight: Tensor, index: Tensor, shape: Sequence[int], *conv: Any
) -> Tensor:
    return empty_maps(grad_y, *shape)


def _grad_weight_kernel(
    grad_y: Tensor, x: Tensor, index: Tensor, size: Sequence[int], with_bias: bool, *conv: Any
) -> tuple[Tensor, Tensor]:
    index = kernel_index(backends.OP, index, size[0])
    return backends.grad_weight(grad_y, x, index, tuple(size), with_bias, _raise(*conv))


def _grad_weight_fake(
    grad_y: Tensor, x: Tensor, index: Tensor, size: Sequence[int], with_bias: bool, *conv: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(tuple(size)), x.new_empty(tuple(size[:2]) if with_bias else 0)


# --- gradients ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, index, *conv = inputs
    _save_for_backward(ctx, x, weight, bias, index, _raise(*conv))


def _save_for_backward(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv
) -> None:
    ctx.save_for_backward(x, weight, index)
    ctx.has_bias = bias is not None
    ctx.conv = conv


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where it is needed."""
    x, weight, index = ctx.saved_tensors
    conv: Conv = ctx.conv
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and ctx.has_bias
    if torch.is_grad_enabled():
        grads = _twice_differentiable_gradients(grad_y, x, weight, index, conv, need_x, need_weight)
        bias = backends.bias_gradient(grad_y, index, weight.shape[0]) if need_bias else None
        return (*grads, bias)
    grad_x = grad_weight = grad_bias = None
    if need_x:
        grad_x = _grad_input_op(grad_y, weight, index, x.shape, *conv)
    if need_weight:
        grad_weight, grad_bias = _grad_weight_op(grad_y, x, index, weight.shape, need_bias, *conv)
    elif need_bias:
        grad_bias = backends.bias_gradient(grad_y, index, weight.shape[0])
    return grad_x, grad_weight, grad_bias if need_bias else None


def _twice_differentiable_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    conv: Conv,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """By the composition, whose gradients autograd can differentiate again."""
    wanted = [t for t, need in ((x, need_x), (weight, need_weight)) if need]
    if not wanted:
        return None, None
    y = compose(x, weight, None, index, conv)
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return (next(grads) if need_x else None, next(grads) if need_weight else None)


class BranchConv2d(torch.autograd.Function):
    """The eager route with gradients; ctx-style, since setup_context costs three times as much."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv
    ) -> Tensor:
        _save_for_backward(ctx, x, weight, bias, index, conv)
        return backends.forward(x, weight, bias, index, conv, recording=ctx.needs_input_grad[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad_y), None, None)


def _gradients_of_op(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_y), *[None] * 5)


def _flops(x: Any, weight: Any, bias: Any, index: Any, *conv: Any, out_shape: Any) -> int:
    return _count_flops(out_shape, weight)


def _grad_input_flops(grad_y: Any, weight: Any, *rest: Any, out_shape: Any) -> int:
    return _count_flops(grad_y, weight)


def _grad_weight_flops(
    grad_y: Any, x: Any, index: Any, size: Any, *rest: Any, out_shape: Any
) -> int:
    return _count_flops(grad_y, size)


def _count_flops(y: Sequence[int], weight: Sequence[int]) -> int:
    """2 per multiply-add of the branches taken; every direction costs the same."""
    return 2 * prod(y) * prod(weight[2:])


forward_op = register(
    f"branch_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor index, {_CONV_SCHEMA}) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
    flops=_flops,
    backward=_gradients_of_op,
    setup_context=_save,
    autocast=True,
)
_grad_input_op = register(
    "branch_conv2d_grad_input(Tensor grad_y, Tensor weight, Tensor index, SymInt[] shape, "
    f"{_CONV_SCHEMA}) -> Tensor",
    kernel=_grad_input_kernel,
    fake=_grad_input_fake,
    flops=_grad_input_flops,
)
_grad_weight_op = register(
    "branch_conv2d_grad_weight(Tensor grad_y, Tensor x, Tensor index, SymInt[] size, "
    f"bool with_bias, {_CONV_SCHEMA}) -> (Tensor, Tensor)",
    kernel=_grad_weight_kernel,
    fake=_grad_weight_fake,
    flops=_grad_weight_flops,
)
