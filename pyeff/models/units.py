"""Which units a task uses at a level: DVN's rule, fixed before training."""

import torch

from pyeff.nn import Range


def unit_order(task: int, k: int) -> list[int]:
    """The order in which a task takes the units: its own, then left, right, left, ... in turn.

    Args:
        task: the unit that the task starts from, 1..k (task i of DVN starts from unit i).
        k: number of units.

    Returns:
        The k unit numbers, from 1; every prefix is an interval.

    Raises:
        ValueError: a task outside 1..k.

    Source: Kim, Ahn, Torr, Oh, "Deep Virtual Networks for Memory Efficient Inference of Multiple
    Tasks", CVPR 2019, figure 2.

    Example:
        >>> unit_order(3, 4)
        [3, 2, 4, 1]
    """
    _check(task, k)
    order, low, high, left = [task], task - 1, task + 1, True
    while len(order) < k:
        if (left and low >= 1) or high > k:
            order.append(low)
            low -= 1
        else:
            order.append(high)
            high += 1
        left = not left
    return order


def active_interval(task: int, level: int, k: int) -> Range:
    """The units of the first ``level`` entries of :func:`unit_order`, as [lo, hi) from 0.

    A closed form, so that a symbolic level (``torch.compile``) stays symbolic: of the level - 1
    units beside the start, level // 2 lie to the left, unless one side is used up.

    Args:
        task: the unit that the task starts from, 1..k.
        level: how many units, 1..k.
        k: number of units.

    Raises:
        ValueError: a task or a level outside 1..k.

    Example:
        >>> active_interval(3, 2, 4)
        (1, 3)
    """
    _check(task, k)
    if not 1 <= level <= k:
        raise ValueError(f"active_interval: level must be in 1..{k}, got {level}")
    if task == 1:
        return 0, level
    if task == k:
        return k - level, k
    left = torch.sym_max(torch.sym_min(level // 2, task - 1), level - 1 - (k - task))
    low = task - 1 - left
    return low, low + level


def _check(task: int, k: int) -> None:
    if not 1 <= task <= k:
        raise ValueError(f"unit_order: task must be in 1..{k}, got {task}")
