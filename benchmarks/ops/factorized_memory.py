"""Peak memory of a training step of factorised pairs, against the composition of convolutions.

    python benchmarks/ops/factorized_memory.py --out docs/results

A chain of ERFNet's pairs (64 channels, 128 x 256 pixels, relu between and after), forward and
backward on the CPU. Each way runs in a process of its own; what is reported is by how much the
step raised the process's largest resident size, in maps (one map of the chain's size is 1).
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timing import machine, markdown_table, write_text

import pyeff

CHANNELS, HEIGHT, WIDTH = 64, 128, 256
MAP_BYTES = CHANNELS * HEIGHT * WIDTH * 4
WAYS = ("pyeff", "composition")
LENGTHS = (2, 4, 8)
NAME = "factorized_memory_cpu"


def pair(way: str, x: Tensor, w_first: Tensor, w_second: Tensor, bias: Tensor) -> Tensor:
    """One pair with relu between and after, in one of the ways."""
    if way == "pyeff":
        return pyeff.ops.factorized_conv2d(x, w_first, bias, w_second, bias, outer="relu")
    middle = F.conv2d(x, w_first, bias, padding=(1, 0)).relu()
    return F.conv2d(middle, w_second, bias, padding=(0, 1)).relu()


def resident() -> int:
    """The largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(way: str, pairs: int, height: int) -> None:
    """Forward and backward through a chain on an image of that height."""
    x = torch.randn(1, CHANNELS, height, WIDTH).contiguous(memory_format=torch.channels_last)
    shape = (CHANNELS, CHANNELS)
    weights = [torch.randn(*shape, *k, requires_grad=True) for k in ((3, 1), (1, 3))]
    bias = torch.zeros(CHANNELS, requires_grad=True)
    for _ in range(pairs):
        x = pair(way, x, *(0.1 * w for w in weights), bias)
    x.sum().backward()


def measure(way: str, pairs: int) -> float:
    """By how many maps a step raises the peak, once libraries have been warmed up."""
    torch.set_num_threads(1)
    step(way, 2, 4)
    before = resident()
    step(way, pairs, HEIGHT)
    return (resident() - before) / MAP_BYTES


def measure_apart(way: str, pairs: int) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--pairs", str(pairs)]
    # glibc then returns every freed map at once, instead of keeping some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def page(rows: list[list[str]]) -> str:
    """The results page."""
    size = f"{CHANNELS} channels and {HEIGHT} x {WIDTH} pixels, float32"
    facts = machine()
    return (
        "# Memory of training with pairs\n\n"
        f"{facts['cpu']}, torch {facts['torch']}, pyeff {facts['pyeff']}, one thread.\n\n"
        f"By how many maps ({size}: {MAP_BYTES / 2**20:.0f} MiB) forward and backward through a "
        "chain of pairs raise the process's largest resident size. Both keep every pair's result "
        "for the backward; the composition of two convolutions keeps the map between them too, "
        "which pyeff computes again.\n\n"
        + markdown_table(["pairs", "pyeff", "composition", "composition / pyeff"], rows)
    )


def main() -> None:
    """Prints the page, and writes FOLDER/factorized_memory_cpu.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the page")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    parser.add_argument("--pairs", type=int, default=8, help="with --way: length of the chain")
    options = parser.parse_args()
    if options.way:
        print(f"{measure(options.way, options.pairs):.2f}")
        return
    rows = []
    for pairs in LENGTHS:
        ours, theirs = (measure_apart(way, pairs) for way in WAYS)
        rows.append([str(pairs), f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"])
    text = page(rows)
    print(text)
    if options.out:
        write_text(options.out / f"{NAME}.md", text)


if __name__ == "__main__":
    main()
