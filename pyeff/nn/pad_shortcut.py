"""The shortcut without weights of residual networks."""

import torch.nn.functional as F
from torch import Tensor


def pad_shortcut(x: Tensor, stride: int, ratio: int, front: int = 0, back: int = 0) -> Tensor:
    """The shortcut without weights (option A): average pooling, new channels zero.

    Channel c goes to channel ``ratio * c``, so that a unit's channels stay in that unit whatever
    the number of units: up to a renaming of channels the usual zero padding.

    Args:
        x: ``[N, C, H, W]``.
        stride: 1 or 2 (2x2 average pooling; a last odd row is averaged alone).
        ratio: the full layer's output channels over its input channels.
        front, back: zero channels to add (or, negative, to drop) before and after, where units
            are rounded differently on both sides.

    Returns:
        ``[N, ratio * C + front + back, ceil(H / stride), ceil(W / stride)]``.
    """
    if stride != 1:
        x = F.avg_pool2d(x, stride, ceil_mode=True)
    last = x.permute(0, 2, 3, 1)
    if ratio != 1:
        last = F.pad(last.unsqueeze(-1), (0, ratio - 1)).flatten(3)
    if front != 0 or back != 0:
        last = F.pad(last, (front, back))
    return last.permute(0, 3, 1, 2)
