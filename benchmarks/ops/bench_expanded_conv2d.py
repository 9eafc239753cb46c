"""The forms of an expanded convolution on the CPU against the compact layer alone.

    python benchmarks/ops/bench_expanded_conv2d.py [--quick] [--out DIR]

A training step (forward, gradients of the input and of all members) in expanded form, in
contracted form and as the plain ``nn.Conv2d`` of the compact size, which is the floor: no training
of an expanded layer can be faster. pyeff is the layer as it comes, with ``form="auto"``. In
inference the layer runs the kernel that it keeps; there the plain layer is the whole comparison.
GFLOP / s are those of the compact layer. With a training step stands by how many MiB it raises the
process's largest resident size, each form in a process of its own (``expanded_memory.py``).
``expanded_forms.py`` makes the table of ``form="auto"`` of the rows.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from timing import Candidate, compare, machine_line, markdown_table

from pyeff.nn import ExpandedConv2d

NAME = "bench_expanded_conv2d_cpu"
PARTS = ("train", "infer")
PLAIN = "plain"
FORMS = ("expanded", "contracted")


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    part: str  # of PARTS
    mode: str
    channels: int
    outputs: int
    kernel: int
    size: int  # height and width of the map
    batch: int
    groups: int = 1
    widths: tuple[int, ...] | None = None
    threads: int = 1

    @property
    def flop(self) -> float:
        """Of the compact layer; training takes three times as many."""
        taps = self.kernel**2 * self.channels * self.outputs / self.groups
        return 2.0 * self.batch * self.size**2 * taps * (3 if self.part == "train" else 1)

    def title(self) -> str:
        """For the progress output."""
        layer = f"{self.channels}->{self.outputs} k{self.kernel} g{self.groups}"
        return f"{self.part} {self.mode} {layer} @{self.size} B{self.batch} T{self.threads}"

    def layer(self, form: str) -> ExpandedConv2d:
        """The expanded layer, random."""
        return ExpandedConv2d(
            self.channels,
            self.outputs,
            self.kernel,
            padding=self.kernel // 2,
            groups=self.groups,
            mode=self.mode,
            widths=self.widths,
            form=form,
        )

    def image(self) -> Tensor:
        """The input, channels_last."""
        x = torch.randn(self.batch, self.channels, self.size, self.size)
        return x.contiguous(memory_format=torch.channels_last)


# Mode, inputs, outputs, kernel, size, batch, groups, widths.
SHAPES: tuple[tuple[Any, ...], ...] = (
    ("ck", 3, 8, 7, 32, 128, 1, (3, 32)),  # SmallNet-7, batch 128
    ("ck", 8, 16, 7, 16, 128),
    ("ck", 16, 32, 7, 8, 128),
    ("cl", 8, 16, 7, 16, 128),
    ("cl", 16, 32, 7, 8, 128),
    ("cl", 16, 32, 3, 6, 128),  # SmallNet-3
    ("ck", 64, 192, 5, 27, 4),  # the AlexNet-like network
    ("cl", 3, 32, 3, 112, 4),  # MobileNets: a stem, depth-wise layers
    ("cl", 64, 64, 3, 56, 4, 64),
    ("cl", 256, 256, 3, 14, 4, 256),
    ("cl", 64, 64, 3, 28, 8),
    ("cl", 128, 128, 3, 7, 8),
    ("cl", 128, 128, 3, 7, 1),  # few pixels
    ("cl", 128, 128, 3, 3, 1),
    ("cl", 128, 128, 3, 1, 1),
    ("ck", 64, 64, 7, 7, 1),
    ("ck", 64, 64, 5, 3, 1),
    ("cl", 8, 8, 3, 8, 4),  # little of everything
    ("ck", 8, 16, 5, 8, 1),
    ("cl", 32, 32, 3, 4, 1, 32),
)


def cases(quick: bool) -> Iterator[Case]:
    """The cases, with the quick ones first."""
    for part in PARTS:
        for shape in SHAPES:
            mode, channels, outputs, kernel, size, batch, *rest = shape
            groups, widths = rest[0] if rest else 1, rest[1] if len(rest) > 1 else None
            numbers = (mode, channels, outputs, kernel, size, batch, groups, widths)
            for threads in (1,) if quick else (1, 2):
                yield Case(part, *numbers, threads)


def step(module: nn.Module, x: Tensor) -> Candidate:
    """Forward and all gradients."""
    x = x.detach().requires_grad_()
    tensors = [x, *module.parameters()]
    with torch.no_grad():
        gradient = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), tensors, gradient)


def inference(module: nn.Module, x: Tensor) -> Candidate:
    """Forward in eval mode."""
    module.eval()
    return lambda: module(x)


def candidates(case: Case) -> dict[str, Candidate]:
    """pyeff's layer, its forms, and the plain layer, all with the same function."""
    torch.manual_seed(0)
    ours = case.layer("auto")
    layers: dict[str, nn.Module] = {OURS: ours}
    x = case.image()
    if case.part == "train":
        layers |= {form: case.layer(form) for form in FORMS}
    for layer in layers.values():
        layer.load_state_dict(ours.state_dict())
    layers[PLAIN] = ours.contract()
    with torch.no_grad():
        expected = layers[PLAIN](x)
        for name, layer in layers.items():
            error = float((layer(x) - expected).abs().max() / expected.abs().max())
            if error > 1e-4:
                raise ValueError(f"{case.title()}: {name} is off by {error:.1e}")
    make = step if case.part == "train" else inference
    return {name: make(layer, x) for name, layer in layers.items()}


def measure(case: Case, quick: bool, memory: bool) -> dict[str, Any]:
    """The row of one case."""
    torch.set_num_threads(case.threads)
    with torch.set_grad_enabled(case.part == "train"):
        found = candidates(case)
        baselines = [name for name in found if name != OURS]
        found[PEAK] = peak(case.threads)
        result = compare(
            found,
            rounds=5 if quick else 15,
            slice_seconds=0.002 if quick else 0.02,
            max_seconds=4.0 if quick else 15.0,
        )
    fma = peak_gflops(result, case.threads)
    row = {**asdict(case), "peak_gflops": fma, **measured(result, baselines, case.flop, fma)}
    row |= {f"ms {name}": result.time(name).median * 1e3 for name in baselines}
    if case.part == "train":
        row["contracted over expanded"] = result.speedup("contracted", "expanded").median
        if memory:
            row |= {f"mib {name}": resident_mib(case, name) for name in (*FORMS, PLAIN)}
    return row


def resident_mib(case: Case, name: str) -> float:
    """What a step of one form adds to a fresh process."""
    script = Path(__file__).with_name("expanded_memory.py")
    command = [sys.executable, str(script), "--case", json.dumps(asdict(case)), "--form", name]
    # glibc then returns every freed map at once, instead of keeping some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables, one a part."""
    text = [
        "# Expanded convolutions on the CPU\n",
        f"{machine_line()}.\n",
        "pyeff is the layer with form auto; a ratio is another way's time / pyeff's in the same "
        "round: above 1, pyeff is faster. `plain` is the compact layer alone, the floor of any "
        "training in expanded form. MiB: what a training step adds to the largest resident size. "
        "Disturbed rows had no three rounds without another process on the core.\n",
    ]
    for part in PARTS:
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            text += [f"## {part}\n", table(chosen)]
    return "\n".join(text)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one part."""
    ratios = [key for key in rows[0] if key.startswith("over ")]
    extra = [key for key in rows[0] if key.startswith(("contracted over", "mib "))]
    columns = ["mode", "layer", "map", "batch", "threads", "ms", "GF/s", "peak", "x floor"]
    columns += [*ratios, *extra, "over the strongest", "disturbed"]
    lines = []
    for row in rows:
        layer = f"{row['channels']} -> {row['outputs']}, k {row['kernel']}, g {row['groups']}"
        place = [row["mode"], layer, row["size"], row["batch"], row["threads"]]
        cells = [f"{row[key]:.2f}" for key in (*ratios, *extra)]
        lines.append([*place, *speed_cells(row, row["peak_gflops"]), *cells, *last_cells(row)])
    return markdown_table(columns, lines)


def main() -> None:
    """Runs the cases and writes the tables as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one thread, few rounds")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    output_options(parser, NAME)
    options = parser.parse_args()
    run_cases(
        (case for case in cases(options.quick) if options.part in (None, case.part)),
        lambda case: measure(case, options.quick, not options.no_memory),
        lambda row: show(row, row["peak_gflops"]),
        lambda rows: write_rows(rows, NAME, options, markdown),
    )


if __name__ == "__main__":
    main()
