"""Ground truth for :func:`pyeff.ops.top_k_routes`: short, slow, any dtype, any device."""

import torch
from torch import Tensor


def top_k_routes(
    scores: Tensor,  # [N, B]
    k: int,
    *,
    weights: str = "binary",  # or "softmax"
) -> tuple[Tensor, Tensor]:  # index int32 [N, k], weight [N, k]
    """The k highest scores of every row, by falling score, ties to the lower index."""
    index = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = scores.gather(1, index)
    weight = torch.ones_like(kept) if weights == "binary" else kept.softmax(dim=1)
    return index.to(torch.int32), weight
