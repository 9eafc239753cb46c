"""Ground truth for :func:`pyeff.ops.nested_conv2d`: short, slow, any dtype, any device."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def nested_conv2d(
    x: Tensor,  # [N, I', H, W], exactly the channels of the range or index
    weight: Tensor,  # [O, I / groups, kh, kw], all levels
    bias: Tensor | None = None,  # [O]
    *,
    in_range: tuple[int, int] | None = None,
    out_range: tuple[int, int] | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | Sequence[int] = 0,  # one, (h, w) or (top, bottom, left, right)
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:  # [N, O', H', W']
    """The convolution of the selected part of the weight, as torch computes it."""
    outputs = out_index if out_index is not None else slice(*(out_range or (0, weight.shape[0])))
    part = weight[outputs]
    if groups == 1:
        inputs = in_index if in_index is not None else slice(*(in_range or (0, weight.shape[1])))
        part = part[:, inputs]
        active_groups = 1
    else:
        active_groups = x.shape[1] // weight.shape[1]
    if not isinstance(padding, int) and len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    elif not isinstance(padding, int):
        padding = tuple(padding)
    return F.conv2d(
        x,
        part,
        None if bias is None else bias[outputs],
        stride,
        padding,
        dilation,
        active_groups,
    )
