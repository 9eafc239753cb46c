"""How the channels of a layer fall into units."""

from collections.abc import Sequence

Range = tuple[int, int]


class ChannelUnits:
    """The channels of one layer, cut into consecutive units.

    Either equal shares, ``bound(u) = multiple * round(channels / multiple * u / units)``, or given
    sizes. Equal shares are computed by that formula and not looked up, so that a unit number which
    is symbolic (``torch.compile``, ``torch.export``) stays symbolic.

    Args:
        channels: channels of the layer (equal shares).
        units: number of units k (equal shares).
        multiple: every unit's size is a multiple of this; must divide ``channels``.
        sizes: channels of each unit, instead of the three above.

    Raises:
        ValueError: sizes that are not all positive, or too few channels for so many units.

    Example:
        >>> ChannelUnits(64, 3).bounds
        (0, 21, 43, 64)
        >>> ChannelUnits(sizes=[16, 16, 32]).channel_range((1, 3))
        (16, 64)
    """

    def __init__(
        self,
        channels: int | None = None,
        units: int | None = None,
        multiple: int = 1,
        *,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.multiple = multiple
        self.equal = sizes is None
        if sizes is not None:
            if channels is not None or units is not None or multiple != 1:
                raise ValueError("ChannelUnits: sizes must stand alone, got channels or units too")
            if not sizes or min(sizes) < 1:
                raise ValueError(f"ChannelUnits: sizes must all be positive, got {list(sizes)}")
            self.channels, self.units = sum(sizes), len(sizes)
            bounds = [0]
            for size in sizes:
                bounds.append(bounds[-1] + size)
        else:
            if channels is None or units is None:
                raise ValueError("ChannelUnits: channels and units must both be given, or sizes")
            if units < 1 or multiple < 1:
                raise ValueError(
                    f"ChannelUnits: units and multiple must be positive, got {units} and {multiple}"
                )
            if channels % multiple or channels // multiple < units:
                raise ValueError(
                    f"ChannelUnits: channels must be a multiple of {multiple} and at least "
                    f"{units * multiple} for {units} units, got {channels}"
                )
            self.channels, self.units = channels, units
            bounds = [self._bound(unit) for unit in range(units + 1)]
        self.bounds: tuple[int, ...] = tuple(bounds)

    def _bound(self, unit: int) -> int:
        blocks = self.channels // self.multiple
        if blocks % self.units == 0:
            return self.channels // self.units * unit
        return self.multiple * ((2 * blocks * unit + self.units) // (2 * self.units))

    def channel_range(self, interval: Range) -> Range:
        """The channels [lo, hi) of the units [lo, hi) (``interval``, counted from 0)."""
        low, high = interval
        if self.equal:
            return self._bound(low), self._bound(high)
        return self.bounds[low], self.bounds[high]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelUnits) and (self.bounds, self.equal) == (
            other.bounds,
            other.equal,
        )

    def __hash__(self) -> int:
        return hash((self.bounds, self.equal))

    def __repr__(self) -> str:
        return f"ChannelUnits(bounds={self.bounds})"
