"""How strong a penalty must be to reach a size: thresholds at which groups die, and a schedule.

The rule. A group that the data do not hold is shortened by ``t * s * w`` at every application: t is
the learning rate, s the strength, w the group's weight. Over the applications to come that is
``s * w * T``, T the sum of their learning rates. So a group of length ``|z|`` will have died at the
end if ``s >= |z| / (w T)``. Of the values ``|z| / w`` the level L is the smallest at which the
groups up to it hold all the parameters that must go. The strength is ``s = L / T + G / t``: what
would lower L to zero by the end, and what the data gave back, G, the difference between L and what
the last application left of it. It is found anew at every application and never above ``L / t``,
which meets the target at once; at the last application T = t, so that it is met.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Without a target: a filter that the data do not hold has died after half of the run.
DOSE = 2.0

# Rounding must not save the last group that shall go.
_MARGIN = 1 + 1e-6


def critical_strength(z: Tensor, weight: float, alpha: float = 0.0) -> Tensor:
    """The strength at which each group dies in one step.

    The smallest s with ``|soft_threshold(z, alpha s w / sqrt(P))| <= (1 - alpha) s w``.

    Args:
        z: ``[G, P]``, a group in each row; times the metric, where there is one.
        weight: w, positive.
        alpha: share of the l1 term, in [0, 1].

    Returns:
        ``[G]``, float64.
    """
    wide = z.double()
    norm = wide.norm(dim=1)
    if alpha == 0:
        return norm / weight
    entry = alpha * weight / math.sqrt(z.shape[1])
    high = wide.abs().amax(1) / entry
    if alpha < 1:
        high = torch.minimum(high, norm / ((1 - alpha) * weight))
    low = torch.zeros_like(high)
    for _ in range(60):
        middle = (low + high) / 2
        left = (wide.abs() - entry * middle[:, None]).clamp_min(0).norm(dim=1)
        dies = left <= (1 - alpha) * weight * middle
        low, high = torch.where(dies, low, middle), torch.where(dies, middle, high)
    return high


def protected(critical: Tensor, floor: int) -> Tensor:
    """The ``floor`` groups that hold out longest; of equal ones the first. bool ``[G]``."""
    kept = torch.zeros(critical.shape[0], dtype=torch.bool)
    kept[critical.cpu().argsort(descending=True, stable=True)[:floor]] = True
    return kept


def level_for_count(levels: Tensor, count: Callable[[float], int], most: int) -> float:
    """The lowest level that leaves at most ``most`` parameters.

    Args:
        levels: at which something dies, any order; 0 is always tried.
        count: parameters that are left above a level: never more for a higher one.
        most: what may be left.

    Returns:
        0 where nothing must go; one of the levels, a little raised, otherwise; the largest where
        even that leaves more.
    """
    if count(0.0) <= most:
        return 0.0
    tried = torch.unique(levels[levels > 0].double().cpu()).tolist()
    low, high = 0, len(tried) - 1
    while low < high:
        middle = (low + high) // 2
        if count(tried[middle] * _MARGIN) <= most:
            high = middle
        else:
            low = middle + 1
    return tried[low] * _MARGIN if tried else 0.0


class TargetRule:
    """The strength of every application on the way to a target; see the module's text.

    Attributes:
        left: what the last application left of the level, in the absence of a gradient; None
            before the first.
    """

    def __init__(self) -> None:
        self.left: float | None = None

    def strength(self, level: float, step: float, ahead: float) -> float:
        """s, from the level L, the step t and the sum of the steps to come T."""
        given_back = 0.0 if self.left is None else max(0.0, level - self.left)
        found = min(level / ahead + given_back / step, level / step)
        self.left = level - found * step
        return found


def check_strength(op: str, strength: float | str) -> None:
    """Raises for a strength that is neither ``"auto"`` nor a number that is not negative."""
    if isinstance(strength, str):
        if strength != "auto":
            raise ValueError(f'{op}: strength must be a number or "auto", got {strength!r}')
    elif not isinstance(strength, (int, float)) or isinstance(strength, bool):
        raise TypeError(f'{op}: strength must be a number or "auto", got {type(strength).__name__}')
    elif not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"{op}: strength must not be negative, got {strength}")


def check_target(op: str, target: float | None, strength: float | str) -> None:
    """Raises for a share out of (0, 1], or one beside a fixed strength."""
    if target is None:
        return
    if not 0 < target <= 1:
        raise ValueError(f"{op}: target_params must be in (0, 1], got {target}")
    if strength != "auto":
        raise ValueError(f'{op}: target_params must come with strength "auto", got {strength}')


def check_factors(op: str, layers: Mapping[str, float] | None, known: Sequence[str]) -> None:
    """Raises for factors of layers that there are not, or negative ones."""
    for name, factor in (layers or {}).items():
        if name not in known:
            raise ValueError(f"{op}: layers must name layers that can be penalised, got {name!r}")
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"{op}: layers must have factors that are not negative, got {factor}")
