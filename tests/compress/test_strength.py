import pytest
import torch

from pyeff.compress import shrink_groups
from pyeff.compress.strength import TargetRule, critical_strength, level_for_count, protected


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_groups_die_at_their_critical_strength_and_not_before(alpha):
    z = torch.randn(12, 7, dtype=torch.float64)
    critical = critical_strength(z, 2.5, alpha)
    for raised, dies in ((1 - 1e-9, False), (1 + 1e-9, True)):
        threshold = critical * raised * 2.5
        out = shrink_groups(z, (1 - alpha) * threshold, l1=alpha * threshold / 7**0.5)
        assert out.eq(0).all(1).tolist() == [dies] * 12


def test_the_level_is_the_lowest_that_leaves_few_enough():
    levels = torch.tensor([0.5, 0.1, 0.3, 0.3, 0.9])

    def count(level):
        return 10 * int((levels > level).sum())

    found = [level_for_count(levels, count, most) for most in (50, 40, 39, 20, 0, -1)]
    assert found[0] == 0.0
    assert found[1:] == pytest.approx([0.1, 0.3, 0.3, 0.9, 0.9], rel=1e-5)
    assert all(
        count(level) <= most for level, most in zip(found, (50, 40, 39, 20, 0), strict=False)
    )


def test_of_equal_groups_the_first_are_sheltered():
    assert protected(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3).tolist() == [1, 1, 0, 0, 1]
    assert protected(torch.ones(2), 5).all()


@pytest.mark.parametrize("back", [0.0, 0.05, 0.3])
def test_the_level_reaches_zero_at_the_end_whatever_the_data_give_back(back):
    rule, level, steps = TargetRule(), 1.0, [0.1] * 5 + [0.02] * 5
    levels = []
    for at, step in enumerate(steps):
        strength = rule.strength(level, step, sum(steps[at:]))
        assert 0 <= strength * step <= level * (1 + 1e-12)
        level -= strength * step
        levels.append(level)
        if at < len(steps) - 1:
            level += back * step / 0.1
    assert levels[-1] == pytest.approx(0, abs=1e-12)
    if back == 0:  # by the same share of the way with every unit of the learning rate
        expected = [1 - sum(steps[: at + 1]) / sum(steps) for at in range(len(steps))]
        assert levels == pytest.approx(expected, abs=1e-12)
    # What was given back last time is taken back: no more than one time's worth is left to do.
    assert levels[-2] <= 0.02 / 0.12 + back
