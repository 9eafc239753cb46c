"""The backends of branch_conv2d, each with a forward, an input and a weight gradient.

Every function takes checked arguments: ``index`` is contiguous int32 [N, k] and names branches.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import _C
from pyeff.ops import _branch_conv2d_cuda as cuda
from pyeff.ops import _branch_conv2d_torch as aten
from pyeff.ops._branch_maps import Conv, channels_innermost, empty_maps, map_strides
from pyeff.ops._dispatch import choose
from pyeff.ops._packed import packed_weight
from pyeff.reference.branch_conv2d import branch_conv2d as reference

OP = "branch_conv2d"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    conv: Conv,
    *,
    recording: bool = False,
) -> Tensor:
    """y [N, k, O, H', W'], O innermost.

    Args:
        x: [N, C, H, W] or [N, k, C, H, W].
        weight: [B, O, C / groups, kh, kw].
        bias: [B, O].
        index: [N, k].
        conv: Where the kernel lies.
        recording: A gradient of the weight will follow.
    """
    name = choose(OP, x, direction="train" if recording else "forward")
    if name == "cpp":
        packed = None if recording else packed_weight(weight, conv.groups)
        return cpp_forward(_cpp(x, weight, index, conv), x, weight, packed, bias, index)
    if name == "triton":
        return _triton().forward(channels_innermost(x), weight, bias, index, *conv)
    if name == "cuda":
        return cuda.forward(x, weight, bias, index, conv)
    if name == "reference":
        return by_reference(x, weight, bias, index, conv)
    return aten.forward(x, weight, bias, index, conv)


def by_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv
) -> Tensor:
    """The reference for one Conv, O innermost; autograd differentiates it."""
    stride, padding, dilation, groups = conv
    y = reference(
        x, weight, bias, index, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return y.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def grad_input(
    grad_y: Tensor, weight: Tensor, index: Tensor, shape: tuple[int, ...], conv: Conv
) -> Tensor:
    """Gradient of x of that shape, [N, C, H, W] or [N, k, C, H, W], C innermost."""
    name = choose(OP, grad_y, direction="grad_input")
    if name == "cpp":
        grad_x = empty_maps(grad_y, *shape)
        _C.branch_conv2d_grad_input(
            channels_innermost(grad_y), weight.contiguous(), index, grad_x, _problem(conv)
        )
        return grad_x
    if name == "triton":
        return _triton().grad_input(channels_innermost(grad_y), weight, shape, index, *conv)
    if name == "cuda":
        return cuda.grad_input(grad_y, weight, index, shape, conv)
    return aten.grad_input(grad_y, weight, index, shape, conv)


def grad_weight(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    size: tuple[int, ...],
    with_bias: bool,
    conv: Conv,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [B, O, C / groups, kh, kw] and of bias [B, O] (else [0]).

    Both are exactly zero for branches that no image takes.
    """
    name = choose(OP, x, direction="grad_weight")
    if name == "cpp":
        result = x.new_empty(size)
        grad_bias = x.new_empty(size[:2] if with_bias else 0)
        _C.branch_conv2d_grad_weight(
            channels_innermost(grad_y),
            channels_innermost(x),
            index,
            result,
            grad_bias if with_bias else None,
            _problem(conv),
        )
        return result, grad_bias
    if name == "triton":
        kernels = _triton()
        plan = kernels.branch_plan(index, size[0])
        grad_y, x = channels_innermost(grad_y), channels_innermost(x)
        result = kernels.grad_weight(grad_y, x, size, index, *conv, plan=plan)
        if not with_bias:
            return result, x.new_empty(0)
        return result, kernels.grad_bias(grad_y, index, size[0], plan=plan)
    if name == "cuda":
        return cuda.grad_weight(grad_y, x, index, size, with_bias, conv)
    bias = bias_gradient(grad_y, index, size[0]) if with_bias else x.new_empty(0)
    return aten.grad_weight(grad_y, x, index, size, conv), bias


def bias_gradient(grad_y: Tensor, index: Tensor, branches: int) -> Tensor:
    """[B, O] from [N, k, O, H', W'] by ATen, differentiable; the same on every run."""
    sums = grad_y.sum(dim=(3, 4)).flatten(0, 1)
    chosen = index.reshape(-1).long()
    # On a GPU a route may name no branch: it takes part in nothing.
    there = (chosen >= 0) & (chosen < branches)
    sums, chosen = sums.where(there[:, None], 0), chosen.where(there, 0)
    zeros = sums.new_zeros(branches, grad_y.shape[2])
    return zeros.index_put((chosen,), sums, accumulate=True)


# --- cpp ------------------------------------------------------------------------------------------


class CppCall(NamedTuple):
    """What a forward call of the cpp backend needs beside its tensors; depends on shapes only."""

    shape: tuple[int, ...]  # of y
    strides: tuple[int, ...]
    problem: tuple[int, ...]


class Call(NamedTuple):
    """A checked call: what to run, and the cpp backend's form of it where that will run."""

    conv: Conv
    cpp: CppCall | None


def cpp_call(x: Tensor, weight: Tensor, index: Tensor, conv: Conv) -> CppCall | None:
    """The call without gradients for tensors of these shapes, if the cpp backend takes it."""
    return _cpp(x, weight, index, conv) if choose(OP, x) == "cpp" else None


def _cpp(x: Tensor, weight: Tensor, index: Tensor, conv: Conv) -> CppCall:
    shape = (*index.shape, weight.shape[1], *conv.output_size(x, weight))
    return CppCall(shape, map_strides(shape), _problem(conv))


def cpp_forward(
    call: CppCall,
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
) -> Tensor:
    """Forward on the CPU kernels."""
    y = x.new_empty_strided(call.shape, call.strides)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.branch_conv2d_forward(channels_innermost(x), weight, packed, bias, index, y, call.problem)
    return y


def _problem(conv: Conv) -> tuple[int, ...]:
    top, _, left, _ = conv.padding
    return (*conv.stride, top, left, *conv.dilation, conv.groups, torch.get_num_threads(), 0)


# --- the others -----------------------------------------------------------------------------------


def _triton() -> ModuleType:
    from pyeff.triton_kernels import branch_conv2d as kernels  # only where it is asked for

    return kernels
