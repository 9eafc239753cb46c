"""combine as PyTorch sees it: backends, registered operators and gradients."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyeff import _C
from pyeff.ops import _branch_combine_torch as aten
from pyeff.ops import _combine_cuda as cuda
from pyeff.ops._branch_index import check_known_values, kernel_index
from pyeff.ops._dispatch import choose, forced_backend
from pyeff.ops._eager import needs_composition
from pyeff.ops._packed import packed_weight
from pyeff.ops._register import register
from pyeff.reference.combine import combine as reference

OP = "combine"


def run(
    y: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    index: Tensor,
    weight: Tensor,
    *,
    plain: bool,
) -> Tensor:
    """The operator on checked arguments, by the shortest route that is open.

    ``plain`` says that nothing but autograd has to see the call.
    """
    if not plain:
        if needs_composition():
            check_known_values(OP, index, projection.shape[0])
            return reference(y, projection, bias, index, weight)
        result: Tensor = forward_op(y, projection, bias, index, weight)
        return result
    index = kernel_index(OP, index, projection.shape[0])
    if forced_backend() == "reference":  # autograd differentiates it
        return reference(y, projection, bias, index, weight)
    tensors = (y, projection, weight) if bias is None else (y, projection, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        z: Tensor = Combine.apply(y, projection, bias, index, weight)
        return z
    return _forward(y, projection, bias, index, weight)


# --- backends -------------------------------------------------------------------------------------


def _forward(
    y: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    index: Tensor,
    weight: Tensor,
    recording: bool = False,
) -> Tensor:
    name = choose(OP, y, direction="train" if recording else "forward")
    if name == "cpp":
        out = y.new_empty(y.shape[0], projection.shape[1])
        # Packed copies are of something.
        direct = recording or projection.numel() == 0
        _C.combine_forward(
            _features_innermost(y),
            projection.contiguous(),
            None if direct else packed_weight(projection, 1),
            None if bias is None else bias.contiguous(),
            index,
            weight.contiguous(),
            out,
            torch.get_num_threads(),
        )
        return out
    if name == "triton":
        result: Tensor = _triton().forward(y, projection, bias, index, weight)
        return result
    if name == "cuda":
        return cuda.forward(y, projection, bias, index, weight)
    if name == "reference":
        return reference(y, projection, bias, index, weight)
    return aten.forward(y, projection, bias, index, weight)


def _grad_input(
    grad_out: Tensor,
    y: Tensor,
    projection: Tensor,
    index: Tensor,
    weight: Tensor,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the routes' weight; what is not needed is [0]."""
    name = choose(OP, y, direction="grad_input")
    if name == "cpp":
        grad_y = y.new_empty(y.shape if need_y else 0)
        grad_weight = y.new_empty(index.shape if need_weight else 0)
        _C.combine_grad_input(
            grad_out.contiguous(),
            _features_innermost(y),
            projection.contiguous(),
            index,
            weight.contiguous(),
            grad_y if need_y else None,
            grad_weight if need_weight else None,
            torch.get_num_threads(),
        )
        return grad_y, grad_weight
    if name == "triton":
        grad_y, grad_weight = _triton().grad_input(
            grad_out, y, projection, index, weight, need_y=need_y, need_weight=need_weight
        )
        none = y.new_empty(0)
        return grad_y if need_y else none, grad_weight if need_weight else none
    if name == "cuda":
        return cuda.grad_input(grad_out, y, projection, index, weight, need_y, need_weight)
    return aten.grad_input(grad_out, y, projection, index, weight, need_y, need_weight)


def _grad_projection(
    grad_out: Tensor, y: Tensor, index: Tensor, weight: Tensor, branches: int
) -> Tensor:
    """[B, O, F], exactly zero for branches that no image takes."""
    name = choose(OP, y, direction="grad_weight")
    if name == "cpp":
        grad = y.new_empty(branches, grad_out.shape[1], y.shape[2])
        _C.combine_grad_projection(
            grad_out.contiguous(),
            _features_innermost(y),
            index,
            weight.contiguous(),
            grad,
            torch.get_num_threads(),
        )
        return grad
    if name == "triton":
        size = (branches, grad_out.shape[1], y.shape[2])
        result: Tensor = _triton().grad_projection(grad_out, y, size, index, weight)
        return result
    if name == "cuda":
        return cuda.grad_projection(grad_out, y, index, weight, branches)
    return aten.grad_projection(grad_out, y, index, weight, branches)


def _features_innermost(y: Tensor) -> Tensor:
    return y if y.stride(2) == 1 or y.shape[2] == 1 else y.contiguous()


def _triton() -> ModuleType:
    from pyeff.triton_kernels import combine as kernels  # only where it is asked for

    return kernels


# --- registered operators -------------------------------------------------------------------------
# Compiled graphs call these with values that no check has seen, hence kernel_index.


def _forward_kernel(
    y: Tensor, projection: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor
) -> Tensor:
    return _forward(y, projection, bias, kernel_index(OP, index, projection.shape[0]), weight)


def _forward_fake(
    y: Tensor, projection: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor
) -> Tensor:
    return y.new_empty(y.shape[0], projection.shape[1])


def _grad_input_kernel(
    grad_out: Tensor, y: Tensor, projection: Tensor, index: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    index = kernel_index(OP, index, projection.shape[0])
    return _grad_input(grad_out, y, projection, index, *rest)


def _grad_input_fake(
    grad_out: Tensor,
    y: Tensor,
    projection: Tensor,
    index: Tensor,
    weight: Tensor,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if need_y else 0), y.new_empty(index.shape if need_weight else 0)


def _grad_projection_kernel(
    grad_out: Tensor, y: Tensor, index: Tensor, weight: Tensor, branches: int
) -> Tensor:
    return _grad_projection(grad_out, y, kernel_index(OP, index, branches), weight, branches)


def _grad_projection_fake(
    grad_out: Tensor, y: Tensor, index: Tensor, weight: Tensor, branches: int
) -> Tensor:
    return y.new_empty(branches, grad_out.shape[1], y.shape[2])


# --- gradients ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, projection, bias, index, weight = inputs
    ctx.save_for_backward(y, projection, index, weight)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y, projection, bias, index (none) and weight, each where it is needed."""
    y, projection, index, weight = ctx.saved_tensors
    need_y, need_projection, need_bias, _, need_weight = ctx.needs_input_grad
    grad_bias = grad_out.sum(0) if need_bias and ctx.has_bias else None
    if torch.is_grad_enabled():
        tensors = ((y, need_y), (projection, need_projection), (weight, need_weight))
        wanted = [t for t, need in tensors if need]
        z = reference(y, projection, None, index, weight)
        grads = iter(torch.autograd.grad(z, wanted, grad_out, create_graph=True) if wanted else ())
        found = [next(grads) if need else None for _, need in tensors]
        return found[0], found[1], grad_bias, None, found[2]
    grad_y = grad_projection = grad_weight = None
    if need_y or need_weight:
        grad_y, grad_weight = _grad_input_op(
            grad_out, y, projection, index, weight, need_y, need_weight
        )
    if need_projection:
        grad_projection = _grad_projection_op(grad_out, y, index, weight, projection.shape[0])
    return (
        grad_y if need_y else None,
        grad_projection,
        grad_bias,
        None,
        grad_weight if need_weight else None,
    )


class Combine(torch.autograd.Function):
    """The eager route with gradients; ctx-style, since setup_context costs three times as much."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        projection: Tensor,
        bias: Tensor | None,
        index: Tensor,
        weight: Tensor,
    ) -> Tensor:
        z = _forward(y, projection, bias, index, weight, recording=ctx.needs_input_grad[1])
        _save(ctx, (y, projection, bias, index, weight), z)
        return z

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out)


def _flops(y: Sequence[int], projection: Sequence[int], *rest: Any, out_shape: Any) -> int:
    return _count_flops(y, projection[1])


def _grad_input_flops(grad_out: Any, y: Any, *rest: Any, out_shape: Any) -> int:
    return _count_flops(y, grad_out[1])


def _count_flops(y: Sequence[int], outputs: int) -> int:
    """2 per multiply-add of the projections taken; every direction costs the same."""
    n, k, features = y
    return 2 * n * k * features * outputs


forward_op = register(
    f"{OP}(Tensor y, Tensor projection, Tensor? bias, Tensor index, Tensor weight) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
    flops=_flops,
    backward=_gradients,
    setup_context=_save,
    autocast=True,
)
_grad_input_op = register(
    f"{OP}_grad_input(Tensor grad_out, Tensor y, Tensor projection, Tensor index, Tensor weight, "
    "bool need_y, bool need_weight) -> (Tensor, Tensor)",
    kernel=_grad_input_kernel,
    fake=_grad_input_fake,
    flops=_grad_input_flops,
)
_grad_projection_op = register(
    f"{OP}_grad_projection(Tensor grad_out, Tensor y, Tensor index, Tensor weight, "
    "SymInt branches) -> Tensor",
    kernel=_grad_projection_kernel,
    fake=_grad_projection_fake,
    flops=_grad_input_flops,
)
