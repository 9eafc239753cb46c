"""Branches on the CPU in float32 against every other way to run k of B of them per image.

    python benchmarks/ops/bench_branch_conv2d.py [--quick] [--part NAME] [--out DIR]

Two residual stages of HydraNets: three basic blocks 32@16 -> 16@8 (CIFAR) and three bottleneck
blocks 256@14 -> 256@7 of width 64. All norms are folded. pyeff runs the whole branch in one call
(branch_stage); "pyeff (per layer)" is branch_conv2d for one layer after the other. The others are
each given their own best conditions, see branch_ways.py: loops over the branches (as it is written
first, in either memory format, with oneDNN's packed weights and fused post-ops, compiled), a loop
over the images, gathered weights and a grouped convolution, capacity padding (what vmap gives),
im2col with bmm or grouped_mm, and all branches at once. All are measured in a few rounds, the
strongest of them in many. The floor is the multiply-add peak measured in the same rounds.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cpu_rows import OURS, PEAK, output_options, peak, peak_gflops, run_cases, write_rows
from ops import branch_ways as ways
from ops.branch_ways import Layer, Run
from timing import Candidate, Comparison, compare, machine_line, markdown_table, write_text

import pyeff
from pyeff.ops import BranchPlan, branch_conv2d, branch_stage

PER_LAYER = "pyeff (per layer)"
LOOPS = ("loop", "loop nchw", "loop prepacked", "loop compiled")
FORMULATIONS = ("gathered", "capacity-padded", "im2col + bmm", "im2col + grouped_mm", "dense")
FINALISTS = 2  # of the baselines, measured in many rounds
NAME = "bench_branch_conv2d_cpu"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    stage: str  # cifar or bottleneck
    branches: int
    k: int
    batch: int
    threads: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return (32, 16, 16) if self.stage == "cifar" else (256, 14, 14)

    def title(self) -> str:
        """For the progress output."""
        return f"{self.stage:10s} B{self.branches} k{self.k} N{self.batch:<3d} T{self.threads}"


def random_layer(branches: int, channels: int, out: int, kernel: int, **options: Any) -> Layer:
    """Parameters that keep maps at about unit size."""
    weight = torch.randn(branches, out, channels, kernel, kernel)
    return Layer(
        weight=weight / (channels * kernel * kernel) ** 0.5,
        bias=torch.randn(branches, out) * 0.1,
        **options,
    )


def cifar_layers(branches: int) -> list[Layer]:
    """Three basic blocks of 16 channels, the first with stride 2 and a projection."""
    layer = partial(random_layer, branches)
    return [
        layer(32, 16, 3, source=0, stride=2),
        layer(32, 16, 1, source=0, stride=2, relu=False),
        layer(16, 16, 3, source=1, residual=2),
        layer(16, 16, 3, source=3),
        layer(16, 16, 3, source=4, residual=3),
        layer(16, 16, 3, source=5),
        layer(16, 16, 3, source=6, residual=5),
    ]


def bottleneck_layers(branches: int) -> list[Layer]:
    """Three bottleneck blocks of width 64 and 256 channels, the first with stride 2."""
    layer = partial(random_layer, branches)
    layers = [
        layer(256, 64, 1, source=0),
        layer(64, 64, 3, source=1, stride=2),
        layer(256, 256, 1, source=0, stride=2, relu=False),
        layer(64, 256, 1, source=2, residual=3),
    ]
    for block in (4, 7):
        layers += [
            layer(256, 64, 1, source=block),
            layer(64, 64, 3, source=block + 1),
            layer(64, 256, 1, source=block + 2, residual=block),
        ]
    return layers


LAYERS = {"cifar": cifar_layers, "bottleneck": bottleneck_layers}


def plan_of(layers: list[Layer]) -> BranchPlan:
    """The branch as branch_stage takes it."""
    first = layers[0].weight
    plan = BranchPlan(first.shape[0], first.shape[2])
    slots = [0]
    for layer in layers:
        place = {"stride": layer.stride, "padding": layer.padding}
        slot = plan.conv2d(slots[layer.source], layer.weight, layer.bias, **place)
        if layer.residual >= 0:
            slot = plan.add(slot, slots[layer.residual])
        slots.append(plan.activation(slot, "relu") if layer.relu else slot)
    return plan


def per_layer(layers: list[Layer]) -> Run:
    """branch_conv2d for one layer after the other."""

    def call(x: Tensor, index: Tensor) -> Tensor:
        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            layer = layers[i]
            y = branch_conv2d(
                x, layer.weight, layer.bias, index, stride=layer.stride, padding=layer.padding
            )
            return ways.finish(y, layer, residual)

        return ways.run_layers(x, layers, conv).flatten(0, 1)

    return call


def average_sizes(case: Case, layers: list[Layer]) -> list[tuple[int, ...]]:
    """The input of every layer in a loop over branches, with an average branch's images."""
    images = max(1, case.batch * case.k // case.branches)
    sizes = [(images, *case.input_shape)]
    for layer in layers:
        _, _, height, width = sizes[layer.source]
        out = layer.weight.shape[1]
        sizes.append((images, out, *(-(-s // layer.stride) for s in (height, width))))
    return [sizes[layer.source] for layer in layers]


def candidates_of(case: Case, layers: list[Layer], quick: bool) -> dict[str, Run]:
    """All ways; compiling takes longer than everything else, so only the headline cases have it."""
    plan = plan_of(layers)
    runs: dict[str, Run] = {
        OURS: lambda x, index: branch_stage(x, index, plan).flatten(0, 1),
        PER_LAYER: per_layer(layers),
        "loop": ways.loop(layers, torch.channels_last),
        "loop nchw": ways.loop(layers, torch.contiguous_format),
        "loop prepacked": ways.loop_prepacked(layers, average_sizes(case, layers)),
        "loop over images": ways.loop_over_images(layers),
        "gathered": ways.gathered(layers),
        "capacity-padded": ways.padded(layers),
        "im2col + bmm": ways.im2col_bmm(layers),
        "im2col + grouped_mm": ways.grouped_mm(layers),
        "dense": ways.dense(layers),
    }
    if not quick and (case.branches, case.k, case.batch) == (20, 4, 32):
        runs["loop compiled"] = ways.loop_compiled(layers)
    return runs


def cases(quick: bool) -> Iterator[Case]:
    """One thread first: its numbers are the ones to trust on a shared machine."""
    for threads in (1,) if quick else (1, 2):
        headline = Case("cifar", 20, 4, 32, threads)
        yield headline
        wide = replace(headline, stage="bottleneck")
        if not quick:
            yield replace(headline, batch=1)
            yield replace(headline, batch=128)
            yield replace(headline, branches=50)
            yield replace(headline, k=2)
            yield replace(headline, k=8)
        yield wide
        yield replace(wide, branches=50)
        if not quick:
            yield replace(wide, batch=1)


def measure(case: Case, quick: bool) -> dict[str, Any]:
    """Times every way of one case and returns its row."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    layers = LAYERS[case.stage](case.branches)
    x = torch.randn(case.batch, *case.input_shape).contiguous(memory_format=torch.channels_last)
    index = torch.stack([torch.randperm(case.branches)[: case.k] for _ in range(case.batch)]).int()
    runs = candidates_of(case, layers, quick)
    calls: dict[str, Candidate] = {
        name: (lambda run=run: run(x, index)) for name, run in runs.items()
    }
    with torch.no_grad():
        for _ in range(2):  # pyeff packs a weight at its second use
            verify(calls)
        first = compare(calls, rounds=3, slice_seconds=0.002, max_seconds=4 if quick else 8)
        finalists = {OURS, PER_LAYER, first.strongest([name for name in LOOPS if name in runs])}
        baselines = [name for name in runs if name not in (OURS, PER_LAYER)]
        finalists |= set(sorted(baselines, key=lambda name: first.time(name).median)[:FINALISTS])
        finalists.add(first.strongest(FORMULATIONS))
        final = {name: calls[name] for name in calls if name in finalists}
        final[PEAK] = peak(case.threads)
        result = compare(
            final,
            rounds=5 if quick else 15,
            slice_seconds=0.002 if quick else 0.008,
            max_seconds=4.0 if quick else 6.0,
        )
    pyeff.clear_packed()
    torch._dynamo.reset()
    flop = 2.0 * plan_of(layers).multiply_adds(case.input_shape) * index.numel()
    return row_of(case, flop, first, result)


def verify(calls: dict[str, Candidate]) -> None:
    """Every way computes the same."""
    want = calls["loop"]()
    for name, call in calls.items():
        torch.testing.assert_close(call(), want, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")  # noqa: B023


def row_of(case: Case, flop: float, first: Comparison, result: Comparison) -> dict[str, Any]:
    """Times, ratios and distance to the peak, as JSON takes them."""
    ours = result.time(OURS)
    baselines = [n for n in result.seconds if n not in (OURS, PER_LAYER, PEAK)]
    strongest = result.strongest(baselines)
    formulation = result.strongest([n for n in baselines if n in FORMULATIONS])
    loop = result.strongest([n for n in baselines if n in LOOPS])
    over = result.speedup(OURS, strongest)
    most = peak_gflops(result, case.threads)
    row: dict[str, Any] = {
        "stage": case.stage,
        "branches": case.branches,
        "k": case.k,
        "batch": case.batch,
        "threads": case.threads,
        "ms": ours.median * 1e3,
        "ms_p10": ours.p10 * 1e3,
        "ms_p90": ours.p90 * 1e3,
        "gflops": flop / ours.median / 1e9,
        "fma_gflops": most,
        "over_floor": ours.median / (flop / most / 1e9),
        "strongest": strongest,
        "strongest_ms": result.time(strongest).median * 1e3,
        "over_strongest": over.median,
        "over_strongest_p10": over.p10,
        "over_strongest_p90": over.p90,
        "formulation": formulation,
        "over_formulation": result.speedup(OURS, formulation).median,
        "best_loop": loop,
        "over_loop": result.speedup(OURS, loop).median,
        "over_per_layer": result.speedup(OURS, PER_LAYER).median,
        "clean": result.clean,
        "rounds": len(result.seconds[OURS]),
    }
    for name in first.seconds:
        if name != OURS:
            source = result if name in result.seconds else first
            row[f"over {name}"] = source.speedup(OURS, name).median
    return row


def show(row: dict[str, Any]) -> str:
    """One line of progress."""
    note = "" if row["clean"] else "  (disturbed)"
    speed = f"{row['gflops']:6.1f} GF/s of {row['fma_gflops']:.0f}"
    return (
        f"{row['ms']:9.4f} ms  {speed}  {row['over_strongest']:.2f}x over {row['strongest']}, "
        f"{row['over_loop']:.2f}x over {row['best_loop']}, "
        f"{row['over_per_layer']:.2f}x over per layer{note}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Two tables: against the strongest, and against each way."""
    names = sorted({key for row in rows for key in row if key.startswith("over ")})
    text = [
        "# Branches on the CPU, float32\n",
        f"{machine_line()}.\n",
        "One call of `branch_stage` for k of B branches on N images, against every other way to do "
        "it that we know. Ratios are medians over paired rounds of baseline time / pyeff time: "
        "above 1, pyeff is faster. In brackets the 10 % and 90 % quantiles. `x floor` is pyeff's "
        "time over that of its multiply-adds at the peak of the same rounds. Disturbed rows had no "
        "three rounds without another process on the core.\n",
        "## Against the strongest\n",
        markdown_table(
            [
                *("stage", "B", "k", "N", "threads", "ms", "GF/s", "peak", "x floor"),
                *("over the strongest", "which", "over the best formulation", "which"),
                *("over the best loop", "which", "over per layer", "disturbed"),
            ],
            [[*_cells(row), *_ratios(row)] for row in rows],
        ),
        "## Against each\n",
        "The strongest ones over 15 rounds, the others over 3.\n",
        markdown_table(
            ["stage", "B", "k", "N", "threads", *(name.removeprefix("over ") for name in names)],
            [[*_cells(row)[:5], *(_ratio(row, name) for name in names)] for row in rows],
        ),
    ]
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        *(str(row[key]) for key in ("stage", "branches", "k", "batch", "threads")),
        f"{row['ms']:.4g}",
        f"{row['gflops']:.0f}",
        f"{row['fma_gflops']:.0f}",
        f"{row['over_floor']:.2f}",
    ]


def _ratios(row: dict[str, Any]) -> list[str]:
    low, high = row["over_strongest_p10"], row["over_strongest_p90"]
    return [
        f"{row['over_strongest']:.2f} [{low:.2f}..{high:.2f}]",
        row["strongest"],
        f"{row['over_formulation']:.2f}",
        row["formulation"],
        f"{row['over_loop']:.2f}",
        row["best_loop"],
        f"{row['over_per_layer']:.2f}",
        "" if row["clean"] else "yes",
    ]


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""


def csv_text(rows: list[dict[str, Any]]) -> str:
    """All columns of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def main() -> None:
    """Runs the cases and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, one thread, few rounds")
    output_options(parser, NAME)
    parser.add_argument("--part", choices=LAYERS, help="only this stage")
    arguments = parser.parse_args()
    run_cases(
        (case for case in cases(arguments.quick) if arguments.part in (None, case.stage)),
        lambda case: measure(case, arguments.quick),
        show,
        lambda rows: write(rows, arguments),
    )


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The rows in every form and place that was asked for, in a folder also as CSV."""
    write_rows(rows, NAME, arguments, markdown)
    if arguments.out:
        write_text(arguments.out / f"{NAME}.csv", csv_text(rows))


if __name__ == "__main__":
    main()
