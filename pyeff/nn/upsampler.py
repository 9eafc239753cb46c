"""ERFNet's layer that doubles the size of a map."""

import torch
from torch import Tensor, nn

from pyeff.nn.conv_norm2d import ConvNorm2d
from pyeff.nn.non_bottleneck_1d import EPS


class Upsampler(ConvNorm2d):
    """``relu(norm(conv(x)))`` with a transposed 3 x 3 convolution of stride 2.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        device, dtype: of the parameters.

    Source: Romera et al., "ERFNet", T-ITS 2018.

    Example:
        >>> Upsampler(64, 16)(torch.randn(1, 64, 4, 4)).shape
        torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, 1, device=device, dtype=dtype),
            EPS,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, outer: str | None = "relu"
    ) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, F, 2 H, 2 W]``."""
        return super().forward(x, residual, outer)
