"""Times of GPU work that can be compared: interleaved, from a cold cache, median and quartiles."""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Milliseconds of one candidate.

    Attributes:
        cold: Median on the device, inputs not in the L2 cache, by CUDA events.
        low: Lower quartile of the same.
        high: Upper quartile of the same.
        wall: Per call in a row of calls, on the host's clock: what Python and launches cost, too.
    """

    cold: float
    low: float
    high: float
    wall: float


class Timer:
    """Measures candidates against each other in shuffled rounds.

    Args:
        rounds: How often every candidate is timed.
        warmup_s: Seconds of work before the first timed round, over all candidates.
        seed: Of the order of the candidates.
    """

    def __init__(self, rounds: int = 25, warmup_s: float = 0.05, seed: int = 0) -> None:
        self.rounds = rounds
        self.warmup_s = warmup_s
        self.random = random.Random(seed)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")

    def measure(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        """The times of every candidate; each is called often, so it must not change its inputs."""
        self._warm_up(candidates)
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        order = list(candidates)
        for _ in range(self.rounds):
            self.random.shuffle(order)
            for name in order:
                samples[name].append(self._once(candidates[name]))
        return {
            name: Times(*_quartiles(samples[name]), self._in_a_row(candidates[name]))
            for name in candidates
        }

    def _warm_up(self, candidates: Mapping[str, Callable[[], object]]) -> None:
        end = time.perf_counter() + self.warmup_s
        while True:
            for call in candidates.values():
                call()
            torch.cuda.synchronize()
            if time.perf_counter() >= end:
                return

    def _once(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the device writes this buffer the host gets ahead with its launches.
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _in_a_row(self, call: Callable[[], object], calls: int = 30) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls


def _quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[last // 2], ordered[last // 4], ordered[3 * last // 4]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph: the same kernels without the host's work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay
