"""nested_conv2d on the CPU in float32 against everything else a user could run instead.

    python benchmarks/ops/bench_nested_conv2d.py [--quick] [--out DIR]

A level's input is a part of a full-width activation, as it is when a wider level ran before. pyeff
reads it where it lies, with one packed copy of the weight for all levels; the time is that of the
whole public call. Baselines, each given its own best conditions: slicing input and full weight at
every call, a cached contiguous slice of the weight, oneDNN with a weight packed for this level (one
copy per level) and an input that is compact already, and for index selections index_select
followed by the packed weight. The floor is the multiply-add peak measured in the same rounds.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cpu_rows import (
    OURS,
    PEAK,
    last_cells,
    measured,
    output_options,
    peak,
    peak_gflops,
    run_cases,
    show,
    speed_cells,
    write_rows,
)
from timing import Candidate, Comparison, compare, machine_line, markdown_table

import pyeff
from pyeff.ops import nested_conv2d

SHAPES = ((256, 14), (128, 28), (64, 56))  # channels, height = width; 3x3, stride 1, padding 1
LEVELS = (0.25, 0.5, 1.0)
NAME = "bench_nested_conv2d_cpu"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    part: str  # range, index, train or overhead
    channels: int
    size: int
    level: float
    batch: int
    threads: int

    @property
    def active(self) -> int:
        """Channels of the level."""
        return int(self.channels * self.level)

    @property
    def flop(self) -> float:
        """Of the forward pass; training takes three times as many."""
        forward = 2.0 * 9 * self.batch * self.size**2 * self.active**2
        return 3 * forward if self.part == "train" else forward

    def title(self) -> str:
        """For the progress output."""
        return (
            f"{self.part:8s} {self.channels}@{self.size} {self.level:4.0%} "
            f"B{self.batch} T{self.threads}"
        )


def image(batch: int, channels: int, size: int) -> Tensor:
    """[batch, channels, size, size], channels_last."""
    x = torch.randn(batch, channels, size, size)
    return x.contiguous(memory_format=torch.channels_last)


def onednn_weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in oneDNN's own layout for inputs like x, as frozen torch.compile has it."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: Tensor = reorder(weight.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, list(x.shape))
    return packed


def onednn_conv2d(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """3x3, stride 1, padding 1, with a weight from ``onednn_weight``."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], ""
    )
    return y


def prepacked(weight: Tensor, bias: Tensor, x: Tensor) -> Candidate:
    """oneDNN on a compact input with a weight packed for this level alone."""
    packed = onednn_weight(weight, x)
    return lambda: onednn_conv2d(x, packed, bias)


def range_candidates(case: Case) -> dict[str, Candidate]:
    """Prefix levels, without gradients."""
    c = case.active
    weight, bias = torch.randn(case.channels, case.channels, 3, 3), torch.randn(case.channels)
    x = image(case.batch, case.channels, case.size)[:, :c]
    compact = x.contiguous(memory_format=torch.channels_last)
    level = weight[:c, :c].contiguous(memory_format=torch.channels_last)
    level_bias = bias[:c].clone()
    span = (0, c)
    return {
        OURS: lambda: nested_conv2d(x, weight, bias, in_range=span, out_range=span, padding=1),
        "sliced": lambda: F.conv2d(x, weight[:c, :c], bias[:c], padding=1),
        "cached slice": lambda: F.conv2d(x, level, level_bias, padding=1),
        "prepacked": prepacked(level, level_bias, compact),
    }


def index_candidates(case: Case) -> dict[str, Candidate]:
    """Input channels chosen by an index from a full activation, without gradients.

    torch copies the chosen channels for both; pyeff then reads the full packed weight by index.
    """
    c = case.active
    weight, bias = torch.randn(case.channels, case.channels, 3, 3), torch.randn(case.channels)
    full = image(case.batch, case.channels, case.size)
    index = torch.randperm(case.channels)[:c]
    level = weight[:c, index].contiguous(memory_format=torch.channels_last)
    level_bias = bias[:c].clone()
    packed = onednn_weight(level, full[:, :c].contiguous(memory_format=torch.channels_last))

    def ours() -> Tensor:
        x = full.index_select(1, index)
        return nested_conv2d(x, weight, bias, in_index=index, out_range=(0, c), padding=1)

    def select_prepacked() -> Tensor:
        return onednn_conv2d(full.index_select(1, index), packed, level_bias)

    return {OURS: ours, "select + prepacked": select_prepacked}


def train_candidates(case: Case) -> dict[str, Candidate]:
    """Forward and backward for the gradients of input, weight and bias."""
    c, span = case.active, (0, case.active)
    weight = torch.randn(case.channels, case.channels, 3, 3, requires_grad=True)
    bias = torch.randn(case.channels, requires_grad=True)
    x = image(case.batch, c, case.size).requires_grad_()
    grad_y = image(case.batch, c, case.size)
    inputs = (x, weight, bias)

    def ours() -> tuple[Tensor, ...]:
        y = nested_conv2d(x, weight, bias, in_range=span, out_range=span, padding=1)
        return torch.autograd.grad(y, inputs, grad_y)

    def own_kernels() -> tuple[Tensor, ...]:
        with pyeff.backend("cpp"):
            return ours()

    def sliced() -> tuple[Tensor, ...]:
        y = F.conv2d(x, weight[:c, :c], bias[:c], padding=1)
        return torch.autograd.grad(y, inputs, grad_y)

    return {OURS: ours, "pyeff (cpp forced)": own_kernels, "sliced": sliced}


def overhead_candidates(case: Case) -> dict[str, Candidate]:
    """A convolution so small that the call itself is what counts."""
    weight, bias = torch.randn(16, 16, 3, 3), torch.randn(16)
    x = image(1, 16, 8)
    return {
        OURS: lambda: nested_conv2d(x, weight, bias, padding=1),
        "F.conv2d": lambda: F.conv2d(x, weight, bias, padding=1),
        "prepacked": prepacked(weight, bias, x),
    }


CANDIDATES = {
    "overhead": overhead_candidates,
    "range": range_candidates,
    "index": index_candidates,
    "train": train_candidates,
}


def cases(quick: bool) -> Iterator[Case]:
    """One thread first: its numbers are the ones to trust on a shared machine."""
    for threads in (1,) if quick else (1, 2):
        yield Case("overhead", 16, 8, 1.0, 1, threads)
        for channels, size in SHAPES[:1] if quick else SHAPES:
            for batch in (1,) if quick else (1, 8, 32):
                for level in LEVELS:
                    yield Case("range", channels, size, level, batch, threads)
            for batch in (1,) if quick else (1, 8):
                for level in LEVELS[:1] if quick else LEVELS[:2]:
                    yield Case("index", channels, size, level, batch, threads)
            for level in LEVELS[:1] if quick else LEVELS:
                yield Case("train", channels, size, level, 4 if quick else 32, threads)


def verify(candidates: dict[str, Candidate]) -> None:
    """Raises where a candidate's result differs from the others by more than rounding."""
    results: dict[str, Any] = {name: call() for name, call in candidates.items()}
    expected = as_tuple(results[OURS])
    for result in results.values():
        for ours, theirs in zip(expected, as_tuple(result), strict=True):
            rounding = 1e-5 * ours.abs().max().item()
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=rounding)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several."""
    return (result,) if isinstance(result, Tensor) else result


def measure(case: Case, quick: bool) -> dict[str, Any]:
    """The row of one case."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    candidates = CANDIDATES[case.part](case)
    baselines = [name for name in candidates if not name.startswith(OURS)]
    with torch.set_grad_enabled(case.part == "train"):
        for _ in range(2):  # pyeff packs a weight at its second use
            verify(candidates)
        candidates[PEAK] = peak(case.threads)
        result = compare(
            candidates,
            rounds=5 if quick else 15,
            slice_seconds=0.002 if quick else 0.008,
            max_seconds=3.0 if quick else 6.0,
        )
    pyeff.clear_packed()
    return row_of(case, result, baselines)


def row_of(case: Case, result: Comparison, baselines: list[str]) -> dict[str, Any]:
    """Times, ratios and distance to the peak, as JSON takes them."""
    found = peak_gflops(result, case.threads)
    return {
        "part": case.part,
        "channels": case.channels,
        "size": case.size,
        "level": case.level,
        "batch": case.batch,
        "threads": case.threads,
        "fma_gflops": found,
        **measured(result, baselines, case.flop, found),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables, one per part."""
    text = [
        "# nested_conv2d on the CPU, float32\n",
        f"{machine_line()}.\n",
        "Ratios are medians over paired rounds of baseline time / pyeff time: above 1, pyeff is "
        "faster. In brackets the 10 % and 90 % quantiles against the strongest baseline. "
        "`x floor` is pyeff's time over that of its multiply-adds at the peak of the same rounds. "
        "Disturbed rows had no three rounds without "
        "another process on the core.\n",
    ]
    for part in CANDIDATES:
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        names = [key for key in chosen[0] if key.startswith("over ")]
        columns = ["shape", "level", "batch", "threads", "ms", "GF/s", "peak", "x floor", *names]
        text.append(f"## {part}\n")
        text.append(
            markdown_table(
                [*columns, "over the strongest", "disturbed"],
                [
                    [*_cells(row), *(f"{row[n]:.2f}" for n in names), *last_cells(row)]
                    for row in chosen
                ],
            )
        )
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['channels']}@{row['size']}",
        f"{row['level']:.0%}",
        str(row["batch"]),
        str(row["threads"]),
        *speed_cells(row, row["fma_gflops"]),
    ]


def main() -> None:
    """Runs the cases and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, one thread, few rounds")
    output_options(parser, NAME)
    parser.add_argument("--part", choices=CANDIDATES, help="only this part")
    arguments = parser.parse_args()
    run_cases(
        (case for case in cases(arguments.quick) if arguments.part in (None, case.part)),
        lambda case: measure(case, arguments.quick),
        lambda row: show(row, row["fma_gflops"]),
        lambda rows: write_rows(rows, NAME, arguments, markdown),
    )


if __name__ == "__main__":
    main()
