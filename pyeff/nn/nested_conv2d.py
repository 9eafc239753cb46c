"""A convolution of which any interval of channels can run."""

import torch
from torch import Tensor, nn

from pyeff.nn.units import Range
from pyeff.ops.nested_conv2d import nested_conv2d


class NestedConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose forward takes the channels that are active.

    ``forward(x, in_range, out_range)`` equals
    ``conv2d(x, weight[o0:o1, i0:i1], bias[o0:o1])``; nothing of the weight is copied and no state
    is kept between calls, so one layer may serve several threads at different levels. Parameters,
    initialisation and state dict are those of ``nn.Conv2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device,
            dtype: as in ``nn.Conv2d``. Zero padding only.

    Example:
        >>> conv = NestedConv2d(8, 16, 3, padding=1)
        >>> conv(torch.randn(1, 4, 5, 5), in_range=(2, 6), out_range=(0, 12)).shape
        torch.Size([1, 12, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Tensor, in_range: Range | None = None, out_range: Range | None = None
    ) -> Tensor:
        """Convolves with the active part of the weight.

        Args:
            x: ``[N, I', H, W]``, exactly the channels of ``in_range``.
            in_range: input channels [lo, hi) of the full layer; ``None`` for all.
            out_range: output channels [lo, hi); ``None`` for all.

        Returns:
            ``[N, O', H', W']``, channels_last.
        """
        return nested_conv2d(
            x,
            self.weight,
            self.bias,
            in_range=in_range,
            out_range=out_range,
            stride=self.stride,  # type: ignore[arg-type]  # torch types it as tuple[int, ...]
            padding=self.padding,  # type: ignore[arg-type]  # as above
            dilation=self.dilation,  # type: ignore[arg-type]  # as above
            groups=self.groups,
        )
