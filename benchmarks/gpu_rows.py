"""What the GPU benchmarks share: dtypes, the check of every candidate, and the loop over rows."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Timer
from timing import write_text
from torch import Tensor

import pyeff

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
# Backends with kernels of ours.
OWN = ("triton", "cuda")
# Largest error against float64, relative to the largest value.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3}


def with_gradients(forward: Callable[[], Tensor], inputs: Any) -> Callable[[], list[Tensor]]:
    """Forward, then the gradients of x, weight and bias."""
    leaves = [inputs.x, inputs.weight, inputs.bias]

    def call() -> list[Tensor]:
        y = forward()
        return [y, *torch.autograd.grad(y, leaves, inputs.grad_y)]

    return call


def verify(problem: Any, name: str, got: Any, expected: list[Tensor]) -> None:
    """Raises RuntimeError where a candidate computes something else."""
    results = got if isinstance(got, list) else [got]
    for index, (actual, right) in enumerate(zip(results, expected, strict=True)):
        error = ((actual.double() - right).abs().max() / right.abs().max()).item()
        if not error <= TOLERANCE[problem.dtype]:
            raise RuntimeError(f"{name} is wrong on {problem}: result {index}, error {error:.2e}")


def own(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """A call of an operator on Triton's kernels and, where they were built, on CUDA C++'s."""
    names = [name for name in OWN if name != "cuda" or pyeff.info()["cuda"]["built"]]
    return {name: _forced(name, call) for name in names}


def _forced(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with pyeff.backend(name):
            return call()

    return run


def summary(flop: float, times: Mapping[str, Any]) -> dict[str, object]:
    """What a row says of its times: the fastest of ours beside the fastest of the others.

    Args:
        flop: floating-point operations of a call.
        times: of the candidates, by name; a graph's name ends with ", graph".
    """

    def fastest(mine: bool, graph: bool) -> float:
        return min(
            time.cold
            for name, time in times.items()
            if (name.split(",")[0] in OWN) == mine and name.endswith("graph") == graph
        )

    return {
        "gflop": flop / 1e9,
        "tflop_per_s": flop / fastest(True, True) / 1e9,
        "times_ms": {name: t._asdict() for name, t in times.items()},
        "ratio_to_strongest": fastest(False, False) / fastest(True, False),
        "ratio_graphs": fastest(False, True) / fastest(True, True),
    }


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a large matrix product: what this device gives at most, in practice."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    times = Timer(rounds=7, warmup_s=0.2).measure({"matmul": lambda: a @ b})
    return 2.0 * size**3 / times["matmul"].cold / 1e9


def run_benchmark(
    name: str,
    description: str,
    problems: Iterable[Any],
    measure: Callable[[Any, Timer], dict[str, object]],
) -> None:
    """Measures for at most ``--seconds`` and keeps the file up to date after every row.

    Args:
        name: The script, named in errors.
        description: Its docstring.
        problems: NamedTuples, the most telling first.
        measure: Makes one row of a problem.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--seconds", type=float, default=150.0, help="stop after this long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{name}: needs a CUDA device, and torch sees none")
    end = time.monotonic() + options.seconds
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    missed: list[dict[str, object]] = []
    rates = {name: matmul_rate(dtype) for name, dtype in DTYPES.items()}
    result: dict[str, object] = {"matmul_tflop_per_s": rates, "rows": rows, "not_measured": missed}
    timer = Timer()
    for problem in problems:
        if time.monotonic() >= end:
            missed.append(problem._asdict())
            continue
        rows.append(measure(problem, timer))
        write_text(options.json, json.dumps(result, indent=1))
    write_text(options.json, json.dumps(result, indent=1))
    print(f"{len(rows)} rows measured, {len(missed)} left for lack of time")
