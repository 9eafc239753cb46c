"""ERFNet's residual block of two pairs of one-dimensional convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.conv_norm2d import ConvNorm2d
from pyeff.nn.factorized_conv2d import FactorizedConv2d

EPS = 1e-3  # of every batch norm in ERFNet


class NonBottleneck1d(nn.Module):
    """``relu(x + dropout(pair2(relu(pair1(x)))))``, every pair with a batch norm at its end.

    A pair is n x 1, ReLU, 1 x n, batch norm; only the second one is dilated. Dropout takes whole
    channels. In eval mode the block is two calls.

    Args:
        channels: of input and output.
        dropout: probability that a channel of the residual is dropped in training.
        dilation: of the second pair.
        order: ``"vertical_first"`` or ``"horizontal_first"``.
        kernel_size: n, odd.
        dense: ordinary n x n convolutions in place of the pairs: what the block is compared with.
        device, dtype: of the parameters.

    Raises:
        ValueError: as :class:`~pyeff.nn.FactorizedConv2d`; an even kernel, a probability out of
            [0, 1].

    Source: Romera, Alvarez, Bergasa, Arroyo, "ERFNet: Efficient Residual Factorized ConvNet for
    Real-Time Semantic Segmentation", T-ITS 2018.

    Example:
        >>> NonBottleneck1d(16, dropout=0.3, dilation=2)(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    conv1: FactorizedConv2d | ConvNorm2d
    conv2: FactorizedConv2d | ConvNorm2d

    def __init__(
        self,
        channels: int,
        dropout: float = 0.0,
        dilation: int = 1,
        order: str = "vertical_first",
        kernel_size: int = 3,
        *,
        dense: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"NonBottleneck1d: dropout must be in [0, 1], got {dropout}")
        if kernel_size % 2 == 0:
            raise ValueError(f"NonBottleneck1d: kernel_size must be odd, got {kernel_size}")

        def pair(spread: int) -> FactorizedConv2d | ConvNorm2d:
            if dense:
                edge = spread * (kernel_size // 2)
                return ConvNorm2d(
                    nn.Conv2d(
                        channels,
                        channels,
                        kernel_size,
                        padding=edge,
                        dilation=spread,
                        device=device,
                        dtype=dtype,
                    ),
                    EPS,
                )
            return FactorizedConv2d(
                channels,
                channels,
                kernel_size,
                padding="same",
                dilation=spread,
                device=device,
                dtype=dtype,
                order=order,
                norm="outer",
                norm_eps=EPS,
            )

        self.conv1, self.conv2 = pair(1), pair(dilation)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to the same shape, channels_last."""
        y = self.conv1(x, outer="relu")
        if self.dropout.training and self.dropout.p > 0:
            return F.relu(self.dropout(self.conv2(y)) + x)
        return self.conv2(y, residual=x, outer="relu")
