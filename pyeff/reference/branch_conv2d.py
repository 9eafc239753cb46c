"""Ground truth for :func:`pyeff.ops.branch_conv2d`: short, slow, any dtype, any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def branch_conv2d(
    x: Tensor,  # [N, C, H, W], or one map for every pair, [N, k, C, H, W]
    weight: Tensor,  # [B, O, C / groups, kh, kw]
    bias: Tensor | None,  # [B, O]
    index: Tensor,  # [N, k]
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | Sequence[int] = 0,  # one, (h, w) or (top, bottom, left, right)
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:  # [N, k, O, H', W']
    """One convolution after another, each as torch computes it."""
    if not isinstance(padding, int) and len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    elif not isinstance(padding, int):
        padding = tuple(padding)
    n, k = index.shape
    if x.dim() == 4:
        x = x.unsqueeze(1).expand(-1, k, -1, -1, -1)
    branches = index.reshape(-1).long()
    rows = x.reshape(n * k, 1, *x.shape[2:]).unbind()
    kernels = weight[branches].unbind()
    biases = [None] * (n * k) if bias is None else bias[branches].unbind()
    results = [
        F.conv2d(row, kernel, b, stride, padding, dilation, groups)
        for row, kernel, b in zip(rows, kernels, biases, strict=True)
    ]
    if not results:
        first = None if bias is None else bias[0]
        empty = F.conv2d(x.flatten(0, 1), weight[0], first, stride, padding, dilation, groups)
        return empty.unflatten(0, (n, k))
    return torch.cat(results).unflatten(0, (n, k))
