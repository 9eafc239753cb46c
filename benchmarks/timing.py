"""Paired timing of alternatives on a machine that others use too.

All candidates run in every round, in shuffled order, and what counts is the median over the rounds
of the ratio within a round: both sides of it saw the same machine. A round in which the process
waited for a processor, or the hypervisor took one away, is dropped. On a GPU the slices are timed
by events.
"""

import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Candidate = Callable[[], object]

_MIN_ROUNDS = 3
_FEW_ROUNDS = 5


@dataclass(frozen=True)
class Spread:
    """Median and the 10 % and 90 % quantiles of some measured values."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Spread of at least one value."""
        ordered = sorted(values)

        def quantile(q: float) -> float:
            return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

        return Spread(statistics.median(ordered), quantile(0.1), quantile(0.9))


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of every candidate in every kept round.

    Attributes:
        seconds: Candidate name to its times, one per kept round, paired by position.
        clean: Whether the kept rounds are undisturbed ones; where fewer than three were, all
            rounds are kept and the numbers should not be trusted.
        rounds: How many rounds were run.
    """

    seconds: dict[str, list[float]]
    clean: bool
    rounds: int

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster ``name`` is than ``over``, within a round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return Spread.of([slow / fast for slow, fast in pairs])

    def strongest(self, names: Sequence[str]) -> str:
        """The fastest of ``names``."""
        return min(names, key=lambda name: self.time(name).median)


def compare(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 15,
    slice_seconds: float = 0.01,
    max_seconds: float = 20.0,
    device: str = "cpu",
    seed: int = 0,
) -> Comparison:
    """Times the candidates against each other.

    Args:
        candidates: Name to a call without arguments; warmed up here.
        rounds: Clean rounds that are wanted; at most four times as many are run.
        slice_seconds: How long one candidate is repeated within a round, in seconds.
        max_seconds: Stops after this time, once five rounds were run, clean or not.
        device: "cpu", or "cuda" to time with events.
        seed: Of the order of the candidates.

    Returns:
        The times of the kept rounds.
    """
    timed = _timed_on_cuda if device == "cuda" else _timed_on_cpu
    repeats = {name: _repeats(call, timed, slice_seconds) for name, call in candidates.items()}
    kept: list[tuple[dict[str, float], bool]] = []
    order, shuffle = list(candidates), random.Random(seed)
    start = time.monotonic()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(kept) < 4 * rounds:
            shuffle.shuffle(order)
            row, clean = {}, True
            for name in order:
                candidates[name]()
                row[name], undisturbed = timed(candidates[name], repeats[name])
                clean &= undisturbed
            kept.append((row, clean))
            if sum(c for _, c in kept) >= rounds:
                break
            if len(kept) >= _FEW_ROUNDS and time.monotonic() - start > max_seconds:
                break
    finally:
        if collecting:
            gc.enable()
    rows = [row for row, clean in kept if clean]
    enough = len(rows) >= _MIN_ROUNDS
    if not enough:
        rows = [row for row, _ in kept]
    return Comparison({name: [row[name] for row in rows] for name in candidates}, enough, len(kept))


def _repeats(
    call: Candidate, timed: Callable[[Candidate, int], tuple[float, bool]], seconds: float
) -> int:
    call()
    call()
    once = min(timed(call, 1)[0] for _ in range(3))
    return max(1, int(seconds / max(once, 1e-7)))


def _timed_on_cpu(call: Candidate, repeats: int) -> tuple[float, bool]:
    """Seconds per call, and whether neither the scheduler nor the hypervisor interfered."""
    waited, stolen, start = _run_queue_wait(), _stolen_ticks(), time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - start
    waited = _run_queue_wait() - waited
    return seconds / repeats, waited < 0.02 * seconds and _stolen_ticks() == stolen


def _timed_on_cuda(call: Candidate, repeats: int) -> tuple[float, bool]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats, True


def _run_queue_wait() -> float:
    """Seconds in which threads of this process could have run but had no processor (Linux)."""
    waited = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(task.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has ended meanwhile
    return waited / 1e9


def _stolen_ticks() -> int:
    stat = Path("/proc/stat")
    return int(stat.read_text().split("\n", 1)[0].split()[8]) if stat.exists() else 0


def prefer_this_process() -> bool:
    """Asks for the highest scheduling priority; False where that is not allowed."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        # Priorities count between sessions only through the autogroup's own.
        autogroup = Path("/proc/self/autogroup")
        if autogroup.exists():
            autogroup.write_text("-20")
    except OSError:
        return False
    return True


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, versions."""
    import pyeff

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    info = {
        "cpu": name,
        "cores": os.cpu_count(),
        "isa": pyeff._C.isa(),
        "torch": torch.__version__,
        "pyeff": pyeff.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def machine_line() -> str:
    """``machine()`` on one line."""
    return ", ".join(f"{key} {value}" for key, value in machine().items())


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the machine and the rows of a benchmark."""
    write_text(path, json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers stand to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
