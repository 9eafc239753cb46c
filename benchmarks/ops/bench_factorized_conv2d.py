"""factorized_conv2d on the CPU against everything else a user could run instead.

    python benchmarks/ops/bench_factorized_conv2d.py [--quick] [--out DIR]

The pairs of ERFNet at 512 x 1024: at every size and dilation, in float32 and bfloat16, the norm
folded into scale and shift, with a residual where the pair ends a block. pyeff's time is that of
the whole public call. Baselines: eager as released (NCHW, the norm a module), eager in
channels_last with the norm folded, oneDNN with prepacked weights and post-operations, and
torch.compile with freezing. The floor is the multiply-add peak measured in the same rounds, twice
as high in bfloat16 on a machine with dot products of it, and direct products are counted: Winograd
does half of them and can pass it. Training compares the gradients of all tensors with autograd's.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
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
from factorized_ways import (
    EagerPair,
    PairTensors,
    compiled,
    eager_channels_last,
    eager_nchw,
    make_pair,
    prepacked,
)
from timing import Candidate, Comparison, compare, machine_line, markdown_table

import pyeff
from pyeff.ops import factorized_conv2d

SHAPES = ((16, 256, 512), (64, 128, 256), (128, 64, 128))  # channels, height, width
DILATIONS = (1, 2, 4, 8, 16)  # of the widest stage; the others have 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECT = "pyeff without Winograd"
PARTS = ("pair", "train")
NAME = "bench_factorized_conv2d_cpu"


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    part: str  # of PARTS
    dtype: str
    channels: int
    height: int
    width: int
    dilation: int
    batch: int
    threads: int

    @property
    def residual(self) -> bool:
        """Dilated pairs, and those of the narrow stages, end a block in ERFNet."""
        return self.dilation > 1 or self.channels < SHAPES[-1][0]

    @property
    def flop(self) -> float:
        """Of two direct convolutions; training takes three times as many."""
        pixels = self.batch * self.height * self.width
        forward = 2.0 * 2 * 3 * self.channels**2 * pixels
        return forward * (3 if self.part == "train" else 1)

    def title(self) -> str:
        """For the progress output."""
        size = f"{self.channels}@{self.height}x{self.width}"
        return (
            f"{self.part:5s} {self.dtype:8s} {size} d{self.dilation} B{self.batch} T{self.threads}"
        )


def pyeff_call(pair: PairTensors, dilation: int) -> Tensor:
    """The public operator."""
    return factorized_conv2d(
        pair.x,
        pair.w_first,
        pair.b_first,
        pair.w_second,
        pair.b_second,
        dilation=dilation,
        scale=pair.scale,
        shift=pair.shift,
        residual=pair.residual,
        outer="relu",
    )


def without_winograd(call: Callable[[], Any]) -> Candidate:
    """The same call with direct products."""

    def run() -> Any:
        with pyeff.winograd(False):
            return call()

    return run


def pair_candidates(case: Case, compiles: bool) -> dict[str, Candidate]:
    """Inference, without gradients."""
    pair, d = make_pair_of(case), case.dilation

    def ours() -> Tensor:
        return pyeff_call(pair, d)

    ways: dict[str, Candidate] = {
        OURS: ours,
        "eager NCHW": eager_nchw(pair, d),
        "eager channels_last": eager_channels_last(pair, d),
        "prepacked": prepacked(pair, d),
        DIRECT: without_winograd(ours),
    }
    if compiles:
        ways["torch.compile"] = compiled(pair, d)
    return ways


def train_candidates(case: Case, compiles: bool) -> dict[str, Candidate]:
    """Forward and backward for the gradients of all tensors."""
    pair, d = make_pair_of(case), case.dilation
    inputs = [t.requires_grad_() for t in pair if t is not None]
    maps = [t for t in (pair.x, pair.residual) if t is not None]
    grad = torch.randn_like(pair.x)
    module = EagerPair(pair, d, folded=True, layout=torch.channels_last)
    eager_inputs = [*module.parameters(), *maps]

    def eager() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(pair.x, pair.residual), eager_inputs, grad)

    return {
        OURS: lambda: torch.autograd.grad(pyeff_call(pair, d), inputs, grad),
        "eager channels_last": eager,
    }


def make_pair_of(case: Case) -> PairTensors:
    """The tensors of a case."""
    size = (case.batch, case.channels, case.height, case.width)
    return make_pair(*size, case.residual, DTYPES[case.dtype])


CANDIDATES = {"pair": pair_candidates, "train": train_candidates}


def cases(quick: bool) -> Iterator[Case]:
    """One thread first: its numbers are the ones to trust on a shared machine."""
    for threads in (1,) if quick else (1, 2):
        for part in PARTS:
            for dtype in DTYPES:
                for channels, height, width in SHAPES:
                    widest = channels == SHAPES[-1][0]
                    dilations = DILATIONS if widest and part == "pair" else (2 if widest else 1,)
                    for dilation in dilations[1::3] if quick and widest else dilations:
                        for batch in (1,) if quick or part == "train" else (1, 4):
                            size = (channels, height, width)
                            yield Case(part, dtype, *size, dilation, batch, threads)


def verify(case: Case, candidates: dict[str, Candidate]) -> None:
    """Raises where a result differs from pyeff's by more than rounding; inference only."""
    expected = candidates[OURS]()
    if not isinstance(expected, Tensor):
        return
    # bfloat16 ways round the scaled weights, the middle map or the unscaled sum.
    share = 2e-5 if case.dtype == "float32" else 3e-2
    tolerance = share * expected.abs().max().item()
    for way in candidates.values():
        torch.testing.assert_close(way(), expected, rtol=share, atol=tolerance)


def measure(case: Case, quick: bool, compiles: bool) -> dict[str, Any]:
    """The row of one case."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.part == "train"):
        candidates = CANDIDATES[case.part](case, compiles)
        baselines = [name for name in candidates if not name.startswith(OURS)]
        for _ in range(2):  # pyeff packs a weight at its second use
            verify(case, candidates)
        candidates[PEAK] = peak(case.threads)
        result = compare(
            candidates,
            rounds=5 if quick else 15,
            slice_seconds=0.002 if quick else 0.02,
            max_seconds=4.0 if quick else 15.0,
        )
    pyeff.clear_packed()
    return row_of(case, result, baselines)


def row_of(case: Case, result: Comparison, baselines: list[str]) -> dict[str, Any]:
    """Times, ratios and distance to the floor, as JSON takes them."""
    found = peak_gflops(result, case.threads)
    if case.dtype == "bfloat16" and "avx512_bf16" in cpu_flags():
        found *= 2
    return {
        **asdict(case),
        "peak_gflops": found,
        **measured(result, baselines, case.flop, found),
    }


def cpu_flags() -> str:
    """What Linux says that the processor can do; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables, one for each part and dtype."""
    text = [
        "# factorized_conv2d on the CPU\n",
        f"{machine_line()}.\n",
        "The pairs of ERFNet for an image of 512 x 1024. Ratios are medians over paired rounds of "
        "baseline time / pyeff time: above 1, pyeff is faster. In brackets the 10 % and 90 % "
        "quantiles against the strongest baseline. `x floor` is pyeff's time over that of the "
        "direct multiply-adds at the peak of the same rounds; Winograd needs half of them. "
        "Disturbed rows had no three rounds without another process on the core.\n",
    ]
    for part in PARTS:
        for dtype in DTYPES:
            chosen = [row for row in rows if row["part"] == part and row["dtype"] == dtype]
            if chosen:
                text += [f"## {part}, {dtype}\n", table(chosen)]
    return "\n".join(text)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same columns."""
    names = [key for key in rows[0] if key.startswith("over ")]
    columns = ["shape", "dilation", "batch", "threads", "ms", "GF/s", "peak", "x floor", *names]
    lines = [[*_cells(row), *(f"{row[n]:.2f}" for n in names), *last_cells(row)] for row in rows]
    return markdown_table([*columns, "over the strongest", "disturbed"], lines)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['channels']}@{row['height']}x{row['width']}",
        str(row["dilation"]),
        str(row["batch"]),
        str(row["threads"]),
        *speed_cells(row, row["peak_gflops"]),
    ]


def main() -> None:
    """Runs the cases and writes the tables as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one thread, batch 1, few rounds")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    output_options(parser, NAME)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    arguments = parser.parse_args()
    chosen = (
        case
        for case in cases(arguments.quick)
        if arguments.part in (None, case.part) and arguments.dtype in (None, case.dtype)
    )
    run_cases(
        chosen,
        lambda case: measure(case, arguments.quick, not arguments.no_compile),
        lambda row: show(row, row["peak_gflops"]),
        lambda rows: write_rows(rows, NAME, arguments, markdown),
    )


if __name__ == "__main__":
    main()
