"""A transposed convolution that runs on the CPU kernels behind ERFNet's samplers in inference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.derived import DerivedValue
from pyeff.ops import _sampler_conv2d as samplers


class PackedConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with its weights packed once for inference.

    For layers that write the largest map of a network: the kernels put large results into few
    pages, which takes about half of PyTorch's time for a float32 result as large as ERFNet's. In
    training, under compilers and tracers, and for what the kernels do not take, it is PyTorch's
    layer.

    Args:
        *args, **kwargs: as of ``nn.ConvTranspose2d``.

    Example:
        >>> PackedConvTranspose2d(16, 20, 2, 2)(torch.randn(1, 16, 4, 4)).shape
        torch.Size([1, 20, 8, 8])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: DerivedValue[samplers.SamplerConv | None] = DerivedValue()

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, F, H', W']``."""
        if output_size is None and self._infers(x):
            native = self._held.get(list(self.parameters()), self._prepare)
            if native is not None and samplers.takes(native, x):
                return samplers.convolve(native, x)
        return super().forward(x, output_size)

    def _infers(self, x: Tensor) -> bool:
        """Whether nobody asks for more than the values."""
        if isinstance(x, Proxy) or torch.compiler.is_compiling():
            return False
        tensors = (x, *self.parameters())
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def _prepare(self) -> samplers.SamplerConv | None:
        # Inference tensors have no version, and no packed copy of them would be kept.
        with torch.inference_mode(False), torch.no_grad():
            return samplers.prepare(self, self.weight, self.bias)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "PackedConvTranspose2d":
        # Moving a parameter changes its memory but not its version.
        super()._apply(fn, recurse)
        self._held.clear()
        return self
