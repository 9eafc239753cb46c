"""Layers whose levels are nested sets of single weights (weight-connection learning)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.ops.nested_conv2d import nested_conv2d


class LevelMask(nn.Module):
    """What the masked layers share: for every weight, the first level that has it.

    One number per weight and not one mask per level, so that the masks are nested by
    construction: M_1 <= M_2 <= ... <= M_L.
    """

    weight: Tensor
    first_level: Tensor
    levels: int

    def _start(self, levels: int) -> None:
        if not 1 <= levels <= 254:
            raise ValueError(f"{type(self).__name__}: levels must be in 1..254, got {levels}")
        self.levels = levels
        self.register_buffer(
            "first_level",
            torch.ones(self.weight.shape, dtype=torch.uint8, device=self.weight.device),
        )

    def mask(self, level: int) -> Tensor:
        """The mask M_level, bool, in the weight's shape."""
        return self.first_level <= level

    def masked_weight(self, level: int | None = None) -> Tensor:
        """The weight with the connections that the level lacks at zero; ``None``: largest level."""
        level = self.levels if level is None else level
        if isinstance(level, int) and not 1 <= level <= self.levels:
            raise ValueError(
                f"{type(self).__name__}: level must be in 1..{self.levels}, got {level}"
            )
        return self.weight * self.mask(level)

    @torch.no_grad()
    def set_density(self, densities: tuple[float, ...] | list[float]) -> None:
        """Lets every level keep the largest weights of the next level up.

        Args:
            densities: for every level, the share of weights it keeps, rising with the level.

        Raises:
            ValueError: shares outside (0, 1], falling, or not one for each level.
        """
        if (
            len(densities) != self.levels
            or min(densities) <= 0
            or max(densities) > 1
            or list(densities) != sorted(densities)
        ):
            raise ValueError(
                f"{type(self).__name__}: densities must be {self.levels} rising shares in (0, 1], "
                f"got {list(densities)}"
            )
        order = self.weight.abs().flatten().argsort(descending=True, stable=True)
        first = torch.full_like(self.first_level, self.levels + 1).flatten()
        for level in range(self.levels, 0, -1):
            first[order[: max(1, round(densities[level - 1] * order.numel()))]] = level
        self.first_level.copy_(first.view_as(self.first_level))


class NestedMaskedConv2d(LevelMask, nn.Conv2d):
    """``nn.Conv2d`` whose levels are nested sets of single weights.

    Args:
        levels: number of levels. The others are nn.Conv2d's.

    Example:
        >>> conv = NestedMaskedConv2d(4, 8, 3, padding=1, levels=2)
        >>> conv.set_density([0.25, 1.0])
        >>> int(conv.mask(1).sum()), conv(torch.randn(1, 4, 5, 5), level=1).shape
        (72, torch.Size([1, 8, 5, 5]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        *,
        levels: int,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self._start(levels)

    def forward(self, x: Tensor, level: int | None = None) -> Tensor:
        """Convolves ``x`` ``[N, C, H, W]`` with the weights of a level (``None``: the largest)."""
        return nested_conv2d(
            x,
            self.masked_weight(level),
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]  # torch types it as tuple[int, ...]
            padding=self.padding,  # type: ignore[arg-type]  # as above
        )


class NestedMaskedLinear(LevelMask, nn.Linear):
    """``nn.Linear`` whose levels are nested sets of single weights.

    Args:
        levels: number of levels. The others are nn.Linear's.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, levels: int
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._start(levels)

    def forward(self, x: Tensor, level: int | None = None) -> Tensor:
        """Multiplies ``x`` ``[..., I]`` by the weights of a level (``None``: the largest)."""
        return F.linear(x, self.masked_weight(level), self.bias)
