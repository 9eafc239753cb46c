"""Which rank a matrix is cut to: by the energy of its singular values, by an error, or as told."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_OP = "factorize"


@dataclass(frozen=True)
class RankRule:
    """How many singular values a layer keeps; exactly one of the three is given.

    Attributes:
        energy: share of the SUM of the singular values (not of their squares), in (0, 1]; 1 keeps
            the numerical rank. One share for all layers gives each its own rank.
        rank: the rank of every layer, or of those that it names.
        max_error: largest relative error of a layer's weights, ``|W - W_r|_F / |W|_F``.

    Raises:
        TypeError: a rank that is no whole number.
        ValueError: none or several given, or a value out of its range.

    Source: the energy rule: Alvarez, Salzmann, "Compression-aware Training of Deep Networks",
    NIPS 2017.
    """

    energy: float | None = None
    rank: int | Mapping[str, int] | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("energy", "rank", "max_error") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{_OP}: energy, rank, max_error must be given one at a time, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"{_OP}: energy must be in (0, 1], got {self.energy}")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise ValueError(f"{_OP}: max_error must be in [0, 1), got {self.max_error}")
        ranks = [] if self.rank is None else [self.rank]
        if isinstance(self.rank, Mapping):
            ranks = list(self.rank.values())
        for rank in ranks:
            if not isinstance(rank, int) or isinstance(rank, bool):
                raise TypeError(f"{_OP}: rank must be a whole number, got {rank!r}")
            if rank < 1:
                raise ValueError(f"{_OP}: rank must be at least 1, got {rank}")

    def of(self, name: str, values: Tensor, floor: float) -> int | None:
        """The rank of a layer.

        Args:
            name: the layer's.
            values: its singular values, falling, float64 ``[R]``.
            floor: singular values up to here are noise of the weights' dtype.

        Returns:
            At least 1 and at most R; ``None`` where the rule leaves this layer out.
        """
        numerical = max(1, int((values > floor).sum()))
        if self.rank is not None:
            asked = self.rank.get(name) if isinstance(self.rank, Mapping) else self.rank
            return None if asked is None else min(asked, len(values))
        if self.energy is not None:
            if self.energy == 1:
                return numerical
            reached = values.cumsum(0) >= self.energy * values.sum()
        else:
            # What the dropped values leave: error(r) of ranks 0..R.
            squares = values.square()
            left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
            limit = (self.max_error or 0.0) ** 2 * squares.sum()
            reached = (left <= limit)[1:]
        # Rounding may leave the last sum a hair below the total.
        found = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else len(values)
        return min(found, numerical)

    def __str__(self) -> str:
        if self.energy is not None:
            return f"{self.energy:g} of the sum of the singular values"
        if self.max_error is not None:
            return f"a relative error of at most {self.max_error:g} in the weights"
        return "ranks by name" if isinstance(self.rank, Mapping) else f"rank {self.rank}"


def noise_floor(values: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Up to where singular values are the rounding of the weights: ``max(shape) eps sigma_1``.

    Args:
        values: singular values, falling ``[R]``.
        shape: of the matrix.
        dtype: of the weights; halves count as float32, whose matrices have no such floor.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return max(shape) * eps * float(values[0])
