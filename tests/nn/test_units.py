"""ChannelUnits: how channels fall into units."""

import pytest

from pyeff.nn import ChannelUnits


def test_equal_shares_are_rounded_bounds():
    assert ChannelUnits(64, 4).bounds == (0, 16, 32, 48, 64)
    assert ChannelUnits(64, 3).bounds == (0, 21, 43, 64)
    assert ChannelUnits(64, 3, multiple=8).bounds == (0, 24, 40, 64)


@pytest.mark.parametrize("units", range(1, 9))
@pytest.mark.parametrize("channels", [8, 16, 37, 160])
def test_units_are_disjoint_and_cover_all_channels(channels, units):
    grid = ChannelUnits(channels, units)
    assert grid.bounds[0] == 0
    assert grid.bounds[-1] == channels
    sizes = [b - a for a, b in zip(grid.bounds, grid.bounds[1:], strict=False)]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    for low in range(units):
        for high in range(low + 1, units + 1):
            assert grid.channel_range((low, high)) == (grid.bounds[low], grid.bounds[high])


def test_given_sizes():
    grid = ChannelUnits(sizes=[4, 8, 20])
    assert (grid.channels, grid.units, grid.bounds) == (32, 3, (0, 4, 12, 32))
    assert grid.channel_range((1, 3)) == (4, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 3, "units": 4}, "channels must be a multiple of 1 and at least 4"),
        ({"channels": 20, "units": 2, "multiple": 8}, "channels must be a multiple of 8"),
        ({"channels": 8, "units": 0}, "units and multiple must be positive, got 0 and 1"),
        ({"sizes": [4, 0]}, r"sizes must all be positive, got \[4, 0\]"),
        ({"sizes": []}, r"sizes must all be positive, got \[\]"),
        ({"sizes": [4], "channels": 4}, "sizes must stand alone"),
        ({"channels": 4}, "channels and units must both be given"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelUnits(**arguments)
