"""ERFNet's layer that halves the size of a map: a convolution and a pooling side by side."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.folding import FoldsNorms, is_affine, norm_affine, norm_tensors
from pyeff.nn.non_bottleneck_1d import EPS
from pyeff.ops import _sampler_conv2d as samplers


class _Folded(NamedTuple):
    """The convolution with its norm, and what the pooled channels have left of theirs."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    native: samplers.SamplerConv | None  # for calls without gradients


class Downsampler(FoldsNorms[_Folded]):
    """``relu(norm(cat(conv(x), max_pool(x))))``: 3 x 3 with stride 2, and 2 x 2 with stride 2.

    In eval mode the norm is folded into the convolution; the pooled channels keep it as a scale and
    a shift.

    Args:
        in_channels: of the input; so many of the output come from the pooling.
        out_channels: of the output, more than ``in_channels``.
        device, dtype: of the parameters.

    Raises:
        ValueError: not more channels out than in.

    Source: Romera et al., "ERFNet", T-ITS 2018.

    Example:
        >>> Downsampler(3, 16)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 16, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= in_channels < out_channels:
            raise ValueError(
                "Downsampler: out_channels must be more than in_channels, both positive, got "
                f"{out_channels} and {in_channels}"
            )
        self.conv = nn.Conv2d(
            in_channels, out_channels - in_channels, 3, 2, 1, device=device, dtype=dtype
        )
        self.norm = nn.BatchNorm2d(out_channels, EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, F, ceil(H / 2), ceil(W / 2)]``."""
        if isinstance(x, Proxy) or not (is_affine(self.norm) and self.is_whole):
            return F.relu(self.norm(torch.cat([self.conv(x), _pool(x)], 1)), inplace=True)
        weight, bias, scale, shift, native = self._folded_for(x)
        if native is not None and samplers.takes(native, x):
            return samplers.convolve_and_pool(native, x, scale, shift, "relu")
        convolved = F.conv2d(x, weight, bias, 2, 1)
        return F.relu(torch.cat([convolved, _affine(_pool(x), scale, shift)], 1), inplace=True)

    def _folded_tensors(self) -> list[Tensor]:
        return [*self.conv.parameters(), *norm_tensors(self.norm)]

    def _fold(self) -> _Folded:
        """Weight and bias of the convolution; scale and shift of the pooled channels."""
        weight, bias = self.conv.weight, self.conv.bias
        scale, shift = norm_affine(self.norm)
        outputs = self.conv.out_channels
        gain, offset = scale[:outputs], shift[:outputs]
        if bias is not None:
            offset = offset + gain * bias
        tensors = (
            weight * gain[:, None, None, None],
            offset,
            scale[outputs:],
            shift[outputs:],
        )
        first, second, third, fourth = (t.to(weight.dtype) for t in tensors)
        return _Folded(first, second, third, fourth, None)

    def _fold_once(self) -> _Folded:
        folded = super()._fold_once()
        return folded._replace(native=samplers.prepare(self.conv, folded.weight, folded.bias))


def _pool(x: Tensor) -> Tensor:
    """The largest of every 2 x 2 pixels, channels_last for such an ``x``."""
    traced = isinstance(x, Proxy) or torch.compiler.is_compiling()
    if traced or x.requires_grad or x.shape[2] % 2 or x.shape[3] % 2:
        return F.max_pool2d(x, 2, 2, ceil_mode=True)
    # PyTorch's pooling takes ten times as long for the three channels of an image.
    image = x.permute(0, 2, 3, 1)
    rows = torch.maximum(image[:, 0::2], image[:, 1::2])
    return torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` for every channel."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return x * scale[:, None, None] + shift[:, None, None]
    # Along whole rows, since few channels leave a vector register almost empty.
    rows = x.permute(0, 2, 3, 1).flatten(2)  # [N, H, W * C]
    width = x.shape[3]
    return (
        (rows * scale.repeat(width))
        .add_(shift.repeat(width))
        .view(x.shape[0], x.shape[2], width, x.shape[1])
        .permute(0, 3, 1, 2)
    )
