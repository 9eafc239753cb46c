"""Learning rates as functions of the step: nothing to save, nothing to restore."""

import math

_START = 1 / 25
_ONECYCLE_WARMUP = 0.25
# After which share of the steps the rate becomes a tenth, and a hundredth.
_DROPS = {"multistep": ((1, 2), (3, 4)), "thirds": ((1, 3), (2, 3))}


def learning_rate(
    step: int, steps: int, *, peak: float, schedule: str, warmup: float = 0.0
) -> float:
    """The learning rate of one step.

    Args:
        step: 0-based.
        steps: of the whole run.
        peak: the highest rate.
        schedule: ``multistep`` (a tenth from 50 %, a hundredth from 75 % of the steps on),
            ``thirds`` (a tenth in the second third of the steps, a hundredth in the last),
            ``cosine`` (half a wave down to 0), ``onecycle`` (up in a straight line, then down in a
            straight line to 0), ``constant``.
        warmup: share of the steps in which the rate rises in a straight line from ``peak / 25``;
            for ``onecycle`` 0 means a quarter.

    Returns:
        The rate, above 0.

    Raises:
        ValueError: no such schedule.

    Source: 50 % and 75 %: Ahn, Kim, Oh, "Deep Elastic Networks with Model Selection for
        Multi-Task Learning", ICCV 2019 (released code). Thirds: Guo, Alvarez, Salzmann,
        "ExpandNets", NeurIPS 2020 (released code). One cycle: Smith, Topin, "Super-Convergence",
        2018, without its momentum cycle.
    """
    if schedule == "onecycle" and not warmup:
        warmup = _ONECYCLE_WARMUP
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (_START + (1 - _START) * (step + 1) / rising)
    left = (steps - step) / (steps - rising)  # 1 at the top, 1 / steps at the last step
    if schedule == "onecycle":
        return peak * left
    if schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * left))
    if schedule == "constant":
        return peak
    if schedule not in _DROPS:
        raise ValueError(
            "learning_rate: schedule must be multistep, thirds, cosine, onecycle or constant, got "
            f"{schedule!r}"
        )
    drops = sum(step * whole >= part * steps for part, whole in _DROPS[schedule])
    return peak * (1.0, 0.1, 0.01)[drops]


def poly_learning_rate(epoch: int, epochs: int, *, peak: float, power: float) -> float:
    """The learning rate of one epoch: ``peak * (1 - epoch / epochs) ** power``.

    Args:
        epoch: 0-based.
        epochs: of the whole run, or of one of its stages.
        peak: of the first epoch.
        power: how it falls; 0 is constant, 1 a straight line.

    Returns:
        The rate, above 0.

    Source: with power 0.9, stepped by the epoch: Romera et al., "ERFNet", T-ITS 2018 (released
        PyTorch code).
    """
    return peak * (1 - epoch / epochs) ** power
