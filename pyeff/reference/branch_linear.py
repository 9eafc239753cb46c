"""Ground truth for :func:`pyeff.ops.branch_linear`: short, slow, any dtype, any device."""

import torch
from torch import Tensor


def branch_linear(
    x: Tensor,  # [N, I], or one row for every pair, [N, k, I]
    weight: Tensor,  # [B, O, I]
    bias: Tensor | None,  # [B, O]
    index: Tensor,  # [N, k]
) -> Tensor:  # [N, k, O]
    """Row (n, j) is x of that pair times the weight of branch index[n, j]."""
    if x.dim() == 2:
        x = x.unsqueeze(1).expand(-1, index.shape[1], -1)
    y = torch.einsum("nki,nkoi->nko", x, weight[index.long()])
    return y if bias is None else y + bias[index.long()]
