"""combine on the CUDA kernels."""

from torch import Tensor

from pyeff import _C as native
from pyeff.ops._top_k_routes_cuda import launch_plan


def forward(
    y: Tensor, projection: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor
) -> Tensor:
    """[N, O] from y [N, k, F]."""
    out = y.new_empty(y.shape[0], projection.shape[1])
    native.combine_forward_cuda(
        _features_innermost(y),
        projection.contiguous(),
        None if bias is None else bias.contiguous(),
        index,
        weight.contiguous(),
        out,
    )
    return out


def grad_input(
    grad_out: Tensor,
    y: Tensor,
    projection: Tensor,
    index: Tensor,
    weight: Tensor,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the routes' weight; what is not needed is [0]."""
    grad_y = y.new_empty(y.shape if need_y else 0)
    grad_weight = y.new_empty(index.shape if need_weight else 0)
    native.combine_grad_input_cuda(
        grad_out.contiguous(),
        _features_innermost(y),
        projection.contiguous(),
        index,
        weight.contiguous(),
        grad_y if need_y else None,
        grad_weight if need_weight else None,
    )
    return grad_y, grad_weight


def grad_projection(
    grad_out: Tensor, y: Tensor, index: Tensor, weight: Tensor, branches: int
) -> Tensor:
    """[B, O, F], exactly zero for branches that no image takes."""
    grad = y.new_empty(branches, grad_out.shape[1], y.shape[2])
    order, offsets = launch_plan(index, branches)
    native.combine_grad_projection_cuda(
        grad_out.contiguous(),
        _features_innermost(y),
        index,
        order,
        offsets,
        weight.contiguous(),
        grad,
    )
    return grad


def _features_innermost(y: Tensor) -> Tensor:
    return y if y.stride(2) == 1 or y.shape[2] == 1 else y.contiguous()
