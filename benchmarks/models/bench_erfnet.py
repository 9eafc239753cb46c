"""The whole ERFNet on the CPU against everything else a user could run instead.

    python benchmarks/models/bench_erfnet.py [--quick] [--size H W] [--out DIR]

All forms run in every round, in shuffled order, on the same images. pyeff's is the model as it is,
in eval mode; plain torch's are the network as released (NCHW, batch norm modules), the same in
channels_last, with norms folded, and that compiled by inductor with frozen weights (erfnet_forms).
``dense`` is the same network with 3 x 3 convolutions in place of the pairs, compiled likewise.
The floor is the network's multiply-adds at the float32 peak measured in the same rounds.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cpu_rows import OURS, PEAK, peak, peak_gflops
from erfnet_forms import as_released, compiled, folded
from timing import (
    Candidate,
    Comparison,
    compare,
    machine_line,
    markdown_table,
    prefer_this_process,
    write_json,
    write_text,
)

import pyeff
from pyeff.models import ERFNet, erfnet

NAME = "bench_erfnet_cpu"
DENSE = "dense, compiled"
RELEASED, COMPILED = "as released", "compiled"
# At (512, 1024), float32; PERFORMANCE.md asks for them.
TARGETS = {COMPILED: 1.5, RELEASED: 2.3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    dtype: str
    batch: int
    size: tuple[int, int]
    threads: int

    def title(self) -> str:
        """For the progress output."""
        return f"{self.dtype} B{self.batch} {self.size[0]}x{self.size[1]} T{self.threads}"


def network(dtype: torch.dtype, *, dense: bool = False) -> ERFNet:
    """ERFNet whose norms have seen images, so that its maps are of the usual size."""
    torch.manual_seed(0)
    model = erfnet(20, dense=dense)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(2, 3, 64, 128))
    return model.eval().to(dtype)


def forms(model: ERFNet, dense: ERFNet | None, x: Tensor) -> dict[str, Any]:
    """Every form of the network, warmed up for ``x``; what compares with ours comes first."""
    torch._dynamo.reset()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    released = as_released(model)
    made = {
        OURS: (model, nhwc),
        RELEASED: (released, x),
        "channels_last": (as_released(model).to(memory_format=torch.channels_last), nhwc),
        "folded": (folded(model), nhwc),
        COMPILED: (compiled(folded(model), nhwc), nhwc),
    }
    if dense is not None:
        made[DENSE] = (compiled(folded(dense), nhwc), nhwc)
    return made


def verify(made: dict[str, Any]) -> None:
    """Raises where a form's result differs from the one as released by more than rounding."""
    run, x = made[RELEASED]
    expected = run(x)
    scale = expected.abs().max().item()
    tolerance = scale * (1e-4 if expected.dtype == torch.float32 else 5e-2)
    for name, (form, images) in made.items():
        if name != DENSE:
            for _ in range(2):  # pyeff packs a weight at its second use
                torch.testing.assert_close(
                    form(images),
                    expected,
                    rtol=0,
                    atol=tolerance,
                    msg=lambda m, n=name: f"{n}: {m}",
                )


def candidate(run: Any, x: Tensor) -> Candidate:
    """A call without arguments."""
    return lambda: run(x)


def measure(case: Case, rounds: int, seconds: float, dense: bool) -> dict[str, Any]:
    """The row of one case."""
    torch.set_num_threads(case.threads)
    x = torch.rand(case.batch, 3, *case.size).to(DTYPES[case.dtype])
    # Not in inference mode: weights made there are never packed ahead.
    model, other = network(x.dtype), network(x.dtype, dense=True) if dense else None
    with torch.inference_mode():
        made = forms(model, other, x)
        verify(made)
        candidates = {name: candidate(run, images) for name, (run, images) in made.items()}
        candidates[PEAK] = peak(case.threads)
        found = compare(candidates, rounds=rounds, slice_seconds=0.001, max_seconds=seconds)
    pyeff.clear_packed()
    return row_of(case, found)


def row_of(case: Case, found: Comparison) -> dict[str, Any]:
    """Times, ratios and distance to the floor, as JSON takes them."""
    ours = found.time(OURS)
    baselines = [name for name in found.seconds if name not in (OURS, PEAK, DENSE)]
    strongest = found.strongest(baselines)
    macs = case.batch * erfnet(20).costs(case.size).macs
    gflops = peak_gflops(found, case.threads)
    row: dict[str, Any] = {
        **vars(case),
        "ms": 1e3 * ours.median,
        "ms_p10": 1e3 * ours.p10,
        "ms_p90": 1e3 * ours.p90,
        "gflops": 2 * macs / ours.median / 1e9,
        "fma_gflops": gflops,
        "over_floor": ours.median / (2 * macs / gflops / 1e9),
        "strongest": strongest,
        "over_strongest": vars(found.speedup(OURS, strongest)),
        "clean": found.clean,
        "rounds": len(found.seconds[OURS]),
        "ms_of": {name: 1e3 * found.time(name).median for name in found.seconds if name != PEAK},
        "over": {
            name: vars(found.speedup(OURS, name))
            for name in found.seconds
            if name not in (OURS, PEAK)
        },
    }
    return row


def show(row: dict[str, Any]) -> str:
    """One line of progress."""
    ratios = "  ".join(f"{name} {spread['median']:.2f}x" for name, spread in row["over"].items())
    note = "" if row["clean"] else "  (disturbed)"
    return f"{row['ms']:8.1f} ms  {row['over_floor']:.2f}x floor  {ratios}{note}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table and how to read it."""
    names = list(dict.fromkeys(name for row in rows for name in row["over"]))
    columns = ["dtype", "batch", "size", "threads", "ms", "x floor", *names, "disturbed"]
    lines = []
    for row in rows:
        cells = [
            f"{s['median']:.2f} [{s['p10']:.2f}..{s['p90']:.2f}]"
            if (s := row["over"].get(name))
            else ""
            for name in names
        ]
        size = "x".join(map(str, row["size"]))
        first = [row["dtype"], row["batch"], size, row["threads"], f"{row['ms']:.1f}"]
        last = "" if row["clean"] else "yes"
        lines.append([*first, f"{row['over_floor']:.2f}", *cells, last])
    targets = " and ".join(f"{ratio} over {name!r}" for name, ratio in TARGETS.items())
    return "\n".join(
        [
            "# ERFNet on the CPU, 20 classes\n",
            f"{machine_line()}.\n",
            "A column named after a form of the network in plain torch is its time over pyeff's, "
            "the median over paired rounds with the 10 % and 90 % quantiles: above 1, pyeff is "
            "faster. `x floor` is pyeff's time over that of the network's multiply-adds at the "
            "float32 peak of the same rounds; bfloat16 can be below 1. Disturbed rows had no three "
            "rounds without another process on the core. Targets, float32 at 512x1024: "
            f"{targets}.\n",
            markdown_table(columns, lines),
        ]
    )


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """One thread first: its numbers are the ones to trust on a shared machine."""
    for threads in arguments.threads:
        for dtype in arguments.dtype:
            for batch in arguments.batch:
                yield Case(dtype, batch, tuple(arguments.size), threads)


def main() -> None:
    """Runs the cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 x 256, one thread, few rounds")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(512, 1024))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dense", action="store_true", help="also the network of 3x3 convolutions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="most, for the rounds of a case"
    )
    parser.add_argument("--out", type=Path, help=f"folder for {NAME}.json and {NAME}.md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.threads, arguments.batch = (128, 256), [1], [1]
        arguments.rounds, arguments.seconds = 5, 5.0
    if any(side % 8 for side in arguments.size):
        parser.error(f"--size must be multiples of 8, got {arguments.size}")
    prefer_this_process()
    print(machine_line())
    rows = []
    for case in cases(arguments):
        rows.append(measure(case, arguments.rounds, arguments.seconds, arguments.dense))
        print(case.title(), show(rows[-1]), flush=True)
        if arguments.out:
            write_json(arguments.out / f"{NAME}.json", rows)
            write_text(arguments.out / f"{NAME}.md", markdown(rows))


if __name__ == "__main__":
    main()
