"""Every form of factorized_conv2d on one CPU thread, beside what the model of its time expects.

    python benchmarks/ops/factorized_forms.py --out docs/results

CPU time of the thread, the least of many calls, so that other processes on the machine matter
little. The rates in ``pyeff/ops/tables/cpu.json`` come from this table.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyeff.ops import _factorized_cpp as cpp
from pyeff.ops import _factorized_torch as aten
from pyeff.ops._factorized_choice import Form, estimates
from pyeff.ops._factorized_pair import FactorPair

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timing import markdown_table, write_text


class Shape(NamedTuple):
    """A pair with C channels in, between and out."""

    n: int
    channels: int
    height: int
    width: int
    dilation: int = 1
    stride: int = 1
    taps: int = 3


SHAPES = (
    Shape(1, 64, 64, 128),
    Shape(1, 128, 32, 64, 2),
    Shape(1, 128, 32, 64, 16),
    Shape(1, 16, 128, 256),
    Shape(1, 32, 64, 64),
    Shape(1, 256, 16, 16),
    Shape(1, 512, 7, 7),
    Shape(4, 48, 28, 28),
    Shape(8, 64, 8, 8),
    Shape(1, 64, 28, 28, 1, 2),
    Shape(1, 64, 28, 28, 1, 1, 5),
)
DTYPES = (torch.float32, torch.bfloat16)
FIRST_COLUMNS = ("x", "kernel", "first", "dtype")
Key = TypeVar("Key")


class Problem(NamedTuple):
    """The tensors of a pair, and the rest."""

    x: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor  # of both
    pair: FactorPair


def make_problem(shape: Shape, dtype: torch.dtype, vertical: bool) -> Problem:
    """Random tensors, channels_last."""
    c, taps = shape.channels, shape.taps
    x = torch.randn(shape.n, c, shape.height, shape.width).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    sizes = ((taps, 1), (1, taps)) if vertical else ((1, taps), (taps, 1))
    weights = [torch.randn(c, c, *size) / (c * taps) ** 0.5 for size in sizes]
    first, second = (w.to(dtype) for w in weights)
    bias = torch.randn(c).to(dtype)
    reach = shape.dilation * (taps // 2)
    pair = FactorPair(shape.stride, reach, shape.dilation, "relu", "relu")
    return Problem(x, first, second, bias, pair)


def candidates(
    problem: Problem,
) -> tuple[dict[Form, float], dict[Form, Callable[[], object]]]:
    """What the model expects of each form, in seconds, and the calls."""
    x, first, second, bias, pair = problem
    expected = estimates(x, first, second, pair)

    def run(form: Form) -> Callable[[], object]:
        if form.name == "torch":
            nothing = (None, None, None)
            return lambda: aten.forward(x, (first, bias), (second, bias), nothing, pair)
        call = cpp.cpp_call(x, first, second, pair, form)
        own = first.clone(), second.clone()  # packed for this form
        return lambda: cpp.forward(call, x, own[0], bias, own[1], bias, None, None, None)

    return expected, {form: run(form) for form in expected}


def measure(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Seconds of CPU time of each, in shuffled rounds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(3):  # packs the weights
            call()
    for _ in range(rounds):
        for key in random.sample(list(calls), len(calls)):
            start = time.process_time()
            calls[key]()
            best[key] = min(best[key], time.process_time() - start)
    return best


def row(shape: Shape, dtype: torch.dtype, vertical: bool, rounds: int) -> list[str]:
    """The cells of one line of the table."""
    expected, calls = candidates(make_problem(shape, dtype, vertical))
    found = measure(calls, rounds)
    chosen = min(expected, key=lambda form: expected[form])
    cells = first_cells(shape, dtype, vertical)
    for name, winograd in FORMS:
        form = Form(name, winograd)
        known = form in found
        cells.append(f"{1e3 * found[form]:.2f} ({1e3 * expected[form]:.2f})" if known else "-")
    return [*cells, describe(chosen), f"{found[chosen] / min(found.values()):.2f}"]


def first_cells(shape: Shape, dtype: torch.dtype, vertical: bool) -> list[str]:
    """Under x, kernel, first and dtype."""
    return [
        f"{shape.n}x{shape.channels}x{shape.height}x{shape.width}",
        f"n {shape.taps}, d {shape.dilation}, s {shape.stride}",
        "vertical" if vertical else "horizontal",
        str(dtype).removeprefix("torch."),
    ]


FORMS = (("fused", False), ("two", False), ("fused", True), ("two", True), ("torch", False))


def describe(form: Form) -> str:
    """A form in words."""
    return f"{form.name}, Winograd" if form.winograd else form.name


def main() -> None:
    """Writes FOLDER/factorized_forms_cpu.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (*FIRST_COLUMNS, *(describe(Form(*f)) for f in FORMS))
    with torch.no_grad():
        rows = [
            row(shape, dtype, vertical, options.rounds)
            for dtype in DTYPES
            for vertical in (True, False)
            for shape in SHAPES
        ]
    page = (
        "# Forms of factorized_conv2d\n\nMilliseconds on one thread; in brackets what the model "
        "expects. The last columns: the form that it chooses, and its time over the best one's.\n\n"
    )
    page += markdown_table((*columns, "chosen", "over best"), rows)
    write_text(options.out / "factorized_forms_cpu.md", page)
    print(page)


if __name__ == "__main__":
    main()
