"""top_k_routes as PyTorch sees it: backends, registered operators and the softmax's gradient."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyeff import _C
from pyeff.ops import _top_k_routes_cuda as cuda
from pyeff.ops._dispatch import choose
from pyeff.ops._register import register
from pyeff.reference.top_k_routes import top_k_routes as reference

OP = "top_k_routes"


def forward(scores: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """index int32 [N, k] and weight [N, k]; ValueError for a NaN on the CPU."""
    name = choose(OP, scores)
    if name == "cpp":
        index = torch.empty((scores.shape[0], k), dtype=torch.int32)
        _C.top_k_routes(scores, index)
        if softmax:
            return index, scores.gather(1, index.long()).softmax(dim=1)
        return index, scores.new_ones(index.shape)
    if name == "triton":
        index, weight = _triton().forward(scores, k, "softmax" if softmax else "binary")
        return index, weight
    if name == "cuda":
        return cuda.forward(scores, k, softmax)
    if scores.is_cpu:
        refuse_nan(scores)
    return reference(scores, k, weights="softmax" if softmax else "binary")


def refuse_nan(scores: Tensor) -> None:
    """ValueError where a score is NaN; waits for a GPU's values."""
    if bool(scores.isnan().any()):
        raise ValueError(f"{OP}: scores must hold no NaN, got {int(scores.isnan().sum())}")


def _fake(scores: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape, dtype=torch.int32), scores.new_empty(shape)


def _grad_kernel(grad_weight: Tensor, index: Tensor, weight: Tensor, branches: int) -> Tensor:
    name = choose(OP, grad_weight, direction="grad_input")
    if name == "triton":
        grad: Tensor = _triton().grad_scores(grad_weight, index, weight, branches)
        return grad
    if name == "cuda":
        return cuda.grad_scores(grad_weight, index, weight, branches)
    slopes = torch.ops.aten._softmax_backward_data(grad_weight, weight, 1, weight.dtype)
    return _scatter(slopes, index, branches)


def _grad_fake(grad_weight: Tensor, index: Tensor, weight: Tensor, branches: int) -> Tensor:
    return grad_weight.new_empty(grad_weight.shape[0], branches)


def _scatter(slopes: Tensor, index: Tensor, branches: int) -> Tensor:
    return slopes.new_zeros(slopes.shape[0], branches).scatter(1, index.long(), slopes)


# --- gradients ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, softmax = inputs
    _save_for_backward(ctx, scores, softmax, *output)


def _save_for_backward(
    ctx: Any, scores: Tensor, softmax: bool, index: Tensor, weight: Tensor
) -> None:
    ctx.save_for_backward(index, weight)
    ctx.mark_non_differentiable(index)
    ctx.softmax = softmax
    ctx.branches = scores.shape[1]


def _gradient(ctx: Any, grad_weight: Tensor) -> Tensor | None:
    if not ctx.softmax:
        return None
    index, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        mean = (weight * grad_weight).sum(dim=1, keepdim=True)
        return _scatter(weight * (grad_weight - mean), index, ctx.branches)
    grad: Tensor = _grad_op(grad_weight, index, weight, ctx.branches)
    return grad


class SoftmaxRoutes(torch.autograd.Function):
    """The eager route with gradients; ctx-style, since setup_context costs three times as much."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index, weight = forward(scores, k, True)
        _save_for_backward(ctx, scores, True, index, weight)
        return index, weight

    @staticmethod
    def backward(ctx: Any, _: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad_weight), None


def _gradients_of_op(ctx: Any, _: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, grad_weight), None, None


def _triton() -> ModuleType:
    from pyeff.triton_kernels import top_k_routes as kernels  # only where it is asked for

    return kernels


forward_op = register(
    f"{OP}(Tensor scores, SymInt k, bool softmax) -> (Tensor, Tensor)",
    kernel=forward,
    fake=_fake,
    backward=_gradients_of_op,
    setup_context=_save,
)
_grad_op = register(
    f"{OP}_grad(Tensor grad_weight, Tensor index, Tensor weight, SymInt branches) -> Tensor",
    kernel=_grad_kernel,
    fake=_grad_fake,
)
