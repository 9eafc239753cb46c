"""nested_conv2d, our kernels, against what a user of cuDNN would run, on the GPU of this machine.

Candidates, forward: ours in Triton and in CUDA C++; F.conv2d on a slice of the weight made at each
call ("sliced"), on a slice made once ("cached slice"), and the first under torch.compile; ours and
the cached slice as CUDA graphs. Training (forward and all three gradients): ours, sliced, and both
as CUDA graphs. Everything is channels_last, with bias; cuDNN picks its algorithm by measuring.
Every candidate is compared with float64 before it is timed.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pyeff

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_rows import DTYPES, OWN, own, run_benchmark, summary, verify, with_gradients
from gpu_timing import Timer, captured

SHAPES = ((256, 14), (128, 28), (64, 56))  # channels, pixels: stages of a residual network
LEVELS = (0.25, 0.5, 1.0)
BATCHES = (8, 1, 32)

Candidate = Callable[[], object]


class Problem(NamedTuple):
    """One row of the table."""

    channels: int
    pixels: int
    level: float
    batch: int
    dtype: str
    training: bool

    @property
    def active(self) -> int:
        return int(self.channels * self.level)

    @property
    def flop(self) -> float:
        """Floating-point operations; training is three convolutions of the same size."""
        one = 2.0 * self.batch * self.pixels**2 * self.active**2 * 9
        return 3 * one if self.training else one

    @property
    def with_compile(self) -> bool:
        # Compiling takes seconds a shape: one level, batch and dtype stand for the others.
        return self.level == 0.5 and self.batch == 8 and self.dtype == "bf16"


class Inputs(NamedTuple):
    """Tensors of a problem, channels_last."""

    x: Tensor  # [N, c, H, W], the active channels
    weight: Tensor  # [C, C, 3, 3]
    bias: Tensor  # [C]
    grad_y: Tensor  # [N, c, H, W]


def problems() -> Iterator[Problem]:
    """The most telling rows first, since the time may not reach for all."""
    for batch in BATCHES:
        for training in (False, True):
            for dtype in DTYPES:
                for channels, pixels in SHAPES:
                    for level in LEVELS:
                        yield Problem(channels, pixels, level, batch, dtype, training)


def make_inputs(problem: Problem, device: str) -> Inputs:
    """Random tensors whose results are near one."""
    dtype, c = DTYPES[problem.dtype], problem.active
    size = (problem.batch, c, problem.pixels, problem.pixels)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = (torch.randn(shape, device=device) * scale).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    full = problem.channels
    weight = draw(full, full, 3, 3, scale=(9 * c) ** -0.5)
    return Inputs(draw(*size), weight, draw(full), draw(*size))


def ours(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """The operator itself, on the backend that the caller forces."""
    level = (0, problem.active)

    def call() -> Tensor:
        return pyeff.ops.nested_conv2d(
            inputs.x, inputs.weight, inputs.bias, in_range=level, out_range=level, padding=1
        )

    return call


def sliced(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """What one writes without the operator."""
    c = problem.active

    def call() -> Tensor:
        return F.conv2d(inputs.x, inputs.weight[:c, :c], inputs.bias[:c], padding=1)

    return call


def cached_slice(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """A compact copy of the level's weight, kept beside the full one; inference only."""
    c = problem.active
    part = inputs.weight[:c, :c].detach().contiguous(memory_format=torch.channels_last)
    bias = inputs.bias[:c].detach().clone()
    return lambda: F.conv2d(inputs.x, part, bias, padding=1)


def eager_candidates(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The candidates that need no capture and no compiler."""
    if not problem.training:
        return {
            "ours": ours(problem, inputs),
            "sliced": sliced(problem, inputs),
            "cached slice": cached_slice(problem, inputs),
        }
    for leaf in inputs[:3]:
        leaf.requires_grad_()
    return {
        "ours": with_gradients(ours(problem, inputs), inputs),
        "sliced": with_gradients(sliced(problem, inputs), inputs),
    }


def all_candidates(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The eager ones, their CUDA graphs and, where it is worth the wait, the compiled one."""
    candidates = eager_candidates(problem, inputs)
    candidates = {**own(candidates.pop("ours")), **candidates}
    if problem.with_compile:
        torch._dynamo.reset()  # every shape is a compilation of its own, not a recompilation
        compiled = torch.compile(sliced(problem, inputs), fullgraph=True)
        candidates["compiled"] = with_gradients(compiled, inputs) if problem.training else compiled
    best = "sliced" if problem.training else "cached slice"
    graphs = [name for name in candidates if name in (*OWN, best)]
    return candidates | {f"{name}, graph": captured(candidates[name]) for name in graphs}


def expected_results(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The same in float64: y, and in training the gradients of x, weight and bias."""
    wide = Inputs(*(t.detach().double() for t in inputs))
    if problem.training:
        for leaf in wide[:3]:
            leaf.requires_grad_()
        return with_gradients(sliced(problem, wide), wide)()
    return [sliced(problem, wide)()]


def measure(problem: Problem, timer: Timer) -> dict[str, object]:
    """One row: what was asked and the times of every candidate."""
    inputs = make_inputs(problem, "cuda")
    torch.backends.cudnn.benchmark = False  # not worth it for the float64 convolutions
    expected = expected_results(problem, inputs)
    torch.backends.cudnn.benchmark = True
    candidates = all_candidates(problem, inputs)
    for name, call in candidates.items():
        verify(problem, name, call(), expected)
    times = timer.measure(candidates)
    found = summary(problem.flop, times)
    return {**problem._asdict(), "active": problem.active, **found}


if __name__ == "__main__":
    run_benchmark("gpu_nested_conv2d", __doc__, problems(), measure)
