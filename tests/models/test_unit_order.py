"""DVN's unit order and intervals."""

import pytest

from pyeff.models import active_interval, unit_order


def test_orders_of_the_paper():
    assert [unit_order(task, 4) for task in (1, 2, 3, 4)] == [
        [1, 2, 3, 4],
        [2, 1, 3, 4],
        [3, 2, 4, 1],
        [4, 3, 2, 1],
    ]


@pytest.mark.parametrize("k", range(1, 9))
def test_every_prefix_is_the_closed_form_interval(k):
    for task in range(1, k + 1):
        order = unit_order(task, k)
        assert sorted(order) == list(range(1, k + 1))
        assert order[0] == task
        for level in range(1, k + 1):
            low, high = active_interval(task, level, k)
            assert sorted(order[:level]) == list(range(low + 1, high + 1))


@pytest.mark.parametrize("k", range(2, 9))
def test_levels_are_nested(k):
    for task in range(1, k + 1):
        for level in range(1, k):
            low, high = active_interval(task, level, k)
            wider = active_interval(task, level + 1, k)
            assert wider[0] <= low
            assert high <= wider[1]
        assert active_interval(task, k, k) == (0, k)


def test_errors():
    with pytest.raises(ValueError, match=r"unit_order: task must be in 1\.\.4, got 5"):
        unit_order(5, 4)
    with pytest.raises(ValueError, match=r"active_interval: level must be in 1\.\.4, got 0"):
        active_interval(1, 0, 4)
