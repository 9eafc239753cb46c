"""Measured time: interleaved, so that a drift of the machine hits every candidate alike."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def measure_latency(
    models: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    repeats: int = 15,
    warmup: int = 3,
) -> list[float]:
    """Median seconds of one forward pass of each model, measured in turn.

    Args:
        models: what to time; each is called with ``x``, without gradient.
        x: the input, ``[N, C, H, W]``.
        repeats: timed rounds; every round calls every model once.
        warmup: rounds before them.

    Returns:
        Seconds, one number for each model.

    Raises:
        ValueError: fewer than one round.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"measure_latency: repeats must be at least 1 and warmup at least 0, got {repeats} "
            f"and {warmup}"
        )
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_ in range(warmup + repeats):
            for model, taken in zip(models, times, strict=True):
                _wait(x)
                start = time.perf_counter()
                model(x)
                _wait(x)
                if round_ >= warmup:
                    taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
