"""Ground truth for :func:`pyeff.ops.combine`: short, slow, any dtype, any device."""

import torch
from torch import Tensor


def combine(
    y: Tensor,  # [N, k, F]
    projection: Tensor,  # [B, O, F]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [N, k]
    weight: Tensor,  # [N, k]
) -> Tensor:  # [N, O]
    """bias + sum_j weight[n, j] * projection[index[n, j]] @ y[n, j]."""
    z = torch.einsum("nk,nkof,nkf->no", weight, projection[index.long()], y)
    return z if bias is None else z + bias
