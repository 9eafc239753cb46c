"""A convolution and the batch norm after it, which are one convolution in inference."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.factorized_conv2d import check_activation
from pyeff.nn.folding import FoldsNorms, is_affine, norm_affine, norm_tensors
from pyeff.ops import _sampler_conv2d as samplers
from pyeff.reference.factorized_conv2d import activation


class _Folded(NamedTuple):
    """Weight and bias of the one convolution."""

    weight: Tensor
    bias: Tensor
    native: samplers.SamplerConv | None  # of a transposed one, for calls without gradients


class ConvNorm2d(FoldsNorms[_Folded]):
    """``norm(conv(x))``; in eval mode with the norm folded into the convolution's weights.

    Args:
        conv: an ``nn.Conv2d``, or an ``nn.ConvTranspose2d`` of one group.
        norm_eps: of the batch norm, which is made for the convolution's output.

    Attributes:
        conv, norm: the layers.

    Raises:
        ValueError: a transposed convolution with groups.

    Example:
        >>> layer = ConvNorm2d(nn.Conv2d(3, 8, 3, padding=1, bias=False))
        >>> layer.eval()(torch.randn(1, 3, 6, 6), outer="relu").shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if isinstance(conv, nn.ConvTranspose2d) and conv.groups != 1:
            raise ValueError(f"ConvNorm2d: conv must have one group, got {conv.groups}")
        self.conv = conv
        self.norm = nn.BatchNorm2d(
            conv.out_channels, norm_eps, device=conv.weight.device, dtype=conv.weight.dtype
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, outer: str | None = None
    ) -> Tensor:
        """Convolves and normalises: ``outer(norm(conv(x)) + residual)``.

        Args:
            x: ``[N, C, H, W]``.
            residual: added before the activation, ``[N, F, H', W']``.
            outer: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or ``None``.

        Returns:
            ``[N, F, H', W']``.
        """
        check_activation("ConvNorm2d", "outer", outer)
        if isinstance(x, Proxy) or not (is_affine(self.norm) and self.is_whole):
            y = self.norm(self.conv(x))
            return activation(y if residual is None else y + residual, outer)
        weight, shift, native = self._folded_for(x, residual)
        if native is not None and samplers.takes(native, x, residual):
            return samplers.convolve(native, x, residual, outer)
        y = _convolve(self.conv, x, weight, shift)
        if torch.is_grad_enabled():
            return activation(y if residual is None else y + residual, outer)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if outer == "relu" else activation(y, outer)

    def _folded_tensors(self) -> list[Tensor]:
        return [*self.conv.parameters(), *norm_tensors(self.norm)]

    def _fold(self) -> _Folded:
        weight, bias = self.conv.weight, self.conv.bias
        scale, shift = norm_affine(self.norm)
        if bias is not None:
            shift = shift + scale * bias
        outputs = 1 if isinstance(self.conv, nn.ConvTranspose2d) else 0
        shape = [1, 1, 1, 1]
        shape[outputs] = -1
        return _Folded((weight * scale.view(shape)).to(weight.dtype), shift.to(weight.dtype), None)

    def _fold_once(self) -> _Folded:
        folded = super()._fold_once()
        if not isinstance(self.conv, nn.ConvTranspose2d):
            return folded  # of ordinary convolutions PyTorch's are as fast
        return folded._replace(native=samplers.prepare(self.conv, folded.weight, folded.bias))


def _convolve(
    conv: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The convolution with other weights."""
    if isinstance(conv, nn.ConvTranspose2d):
        padding: Any = conv.padding
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            conv.stride,
            padding,
            conv.output_padding,
            conv.groups,
            conv.dilation,
        )
    return conv._conv_forward(x, weight, bias)
