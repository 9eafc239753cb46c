"""combine composed of ATen's operators: one long vector an image, and one matrix product.

Features stand at their branch's place in [N, B * F], zeros elsewhere. That multiplies B / k times
as much as is needed, but gathers no projections, which would cost more.
"""

import torch
from torch import Tensor


def forward(
    y: Tensor, projection: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor
) -> Tensor:
    """[N, O]."""
    placed = _placed(y, index, weight, projection.shape[0]).flatten(1)
    matrix = projection.transpose(1, 2).flatten(0, 1).to(placed.dtype)  # [B * F, O]
    z = placed @ matrix if bias is None else torch.addmm(bias.to(placed.dtype), placed, matrix)
    return z.to(y.dtype)


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
    branches, _, features = projection.shape
    wide = _sum_dtype(y)
    # What every branch would send back, [N, B, F]; the chosen ones are picked.
    all_branches = grad_out.to(wide) @ projection.transpose(0, 1).flatten(1).to(wide)
    places = index.long()[..., None].expand(-1, -1, features)
    back = all_branches.unflatten(1, (branches, features)).gather(1, places)
    none = y.new_empty(0)
    return (
        (back * weight.to(wide)[..., None]).to(y.dtype) if need_y else none,
        (back * y).sum(2).to(weight.dtype) if need_weight else none,
    )


def grad_projection(
    grad_out: Tensor, y: Tensor, index: Tensor, weight: Tensor, branches: int
) -> Tensor:
    """[B, O, F]; zero columns of the placed features give exact zeros."""
    placed = _placed(y, index, weight, branches)
    product = grad_out.to(placed.dtype).t() @ placed.flatten(1)  # [O, B * F]
    return product.unflatten(1, placed.shape[1:]).transpose(0, 1).to(y.dtype).contiguous()


def _sum_dtype(y: Tensor) -> torch.dtype:
    """Products with the routes' weights are rounded once, at the end."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def _placed(y: Tensor, index: Tensor, weight: Tensor, branches: int) -> Tensor:
    """[N, B, F]; a branch that stands twice in a row of the index adds up."""
    wide = _sum_dtype(y)
    n, _, features = y.shape
    places = index.long()[..., None].expand(-1, -1, features)
    zeros = torch.zeros(n, branches, features, dtype=wide, device=y.device)
    return zeros.scatter_add_(1, places, y.to(wide) * weight.to(wide)[..., None])
