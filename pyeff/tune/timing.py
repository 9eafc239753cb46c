"""Median seconds of calls, in turn."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_ROUNDS = 7


def seconds_of(
    calls: Mapping[str, Callable[[], object]], device: torch.device, slice_seconds: float
) -> dict[str, float]:
    """Seconds of one call of each, warm; a round runs all of them, each for a slice of time.

    Args:
        calls: name to a call.
        device: is waited for at the end of a slice.
        slice_seconds: how long a call is repeated within a round, about.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, packs, allocates
        once = _slice(call, 1, device)
        repeats[name] = max(1, min(1000, int(slice_seconds / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            taken[name].append(_slice(call, repeats[name], device) / repeats[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def _slice(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
