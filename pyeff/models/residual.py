"""The wiring of a residual network, told once for plain and nested layers.

A subclass says what a layer with a given name does; the blocks here say in which order. ``active``
is passed on to the layers untouched: an :class:`~pyeff.models.layout.Active` for nested layers,
``None`` for plain ones.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """A basic or bottleneck block, pre- or post-activation; a subclass brings the layers.

    Args:
        convolutions: how many convolutions the block has.
        preactivation: the order of norm, ReLU and convolution.
        shortcut: ``"identity"``, ``"pad"`` or ``"projection"``.
    """

    def __init__(self, convolutions: int, preactivation: bool, shortcut: str) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.preactivation = preactivation
        self.shortcut = shortcut

    def convolve(self, name: str, x: Tensor, active: Any) -> Tensor:
        """Runs the convolution called ``name``."""
        raise NotImplementedError("ResidualBlock: convolve is what a subclass brings")

    def normalise(self, name: str, x: Tensor, active: Any) -> Tensor:
        """Runs the norm called ``name``."""
        raise NotImplementedError("ResidualBlock: normalise is what a subclass brings")

    def pad(self, x: Tensor, active: Any) -> Tensor:
        """Runs the shortcut without weights."""
        raise NotImplementedError("ResidualBlock: pad is what a subclass brings")

    def forward(self, x: Tensor, active: Any = None) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        if self.preactivation:
            y = F.relu(self.normalise("norm1", x, active), inplace=True)
            beside = self._beside(x, y, active)
            y = self.convolve("conv1", y, active)
            for i in range(2, self.convolutions + 1):
                y = F.relu(self.normalise(f"norm{i}", y, active), inplace=True)
                y = self.convolve(f"conv{i}", y, active)
            return y + beside
        y = x
        for i in range(1, self.convolutions + 1):
            y = self.normalise(f"norm{i}", self.convolve(f"conv{i}", y, active), active)
            if i < self.convolutions:
                y = F.relu(y, inplace=True)
        return F.relu(y + self._beside(x, x, active), inplace=True)

    def _beside(self, x: Tensor, activated: Tensor, active: Any) -> Tensor:
        if self.shortcut == "identity":
            return x
        if self.shortcut == "pad":
            return self.pad(x, active)
        y = self.convolve("shortcut_conv", activated, active)
        return y if self.preactivation else self.normalise("shortcut_norm", y, active)


def global_pool(x: Tensor) -> Tensor:
    """Mean over the positions: ``[N, C, H, W]`` to ``[N, C]``."""
    return x.mean((2, 3))
