"""Ground truth for :func:`pyeff.ops.factorized_conv2d`: short, slow, any dtype, any device."""

import torch.nn.functional as F
from torch import Tensor


def factorized_conv2d(
    x: Tensor,  # [N, C, H, W]
    w_first: Tensor,  # [L, C, n, 1] or [L, C, 1, n]
    b_first: Tensor | None,  # [L]
    w_second: Tensor,  # [F, L, 1, n] or [F, L, n, 1]
    b_second: Tensor | None,  # [F]
    *,
    stride: int = 1,
    padding: int | str = "same",
    dilation: int = 1,
    inner: str | None = "relu",
    scale: Tensor | None = None,  # [F]
    shift: Tensor | None = None,  # [F]
    residual: Tensor | None = None,  # [N, F, H', W']
    outer: str | None = None,
) -> Tensor:  # [N, F, H', W']
    """The two convolutions and every step between and after them, as torch computes them."""
    taps = w_first.shape[2] * w_first.shape[3]
    if isinstance(padding, str):
        padding = {"same": dilation * (taps // 2), "valid": 0}[padding]

    vertical = w_first.shape[3] == 1  # the first one
    middle = _conv1d(x, w_first, b_first, vertical, stride, padding, dilation)
    middle = activation(middle, inner)
    y = _conv1d(middle, w_second, b_second, not vertical, stride, padding, dilation)
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    if residual is not None:
        y = y + residual
    return activation(y, outer)


def _conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vertical: bool,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """A convolution along one axis; it leaves the other as it is."""
    if vertical:
        return F.conv2d(x, weight, bias, (stride, 1), (padding, 0), (dilation, 1))
    return F.conv2d(x, weight, bias, (1, stride), (0, padding), (1, dilation))


def activation(x: Tensor, name: str | None) -> Tensor:
    """``x`` where there is no name."""
    return x if name is None else _ACTIVATIONS[name](x)


_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
