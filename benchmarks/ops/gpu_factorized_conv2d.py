"""factorized_conv2d, our kernels, against what a user of cuDNN would run, on this machine's GPU.

ERFNet's pairs with a folded norm and relu between and after, at 512 x 1024. Candidates, forward and
training (forward and the gradients of x, both weights and both biases): ours in Triton and in CUDA
C++; two convolutions and what stands around them ("eager"); the same compiled by Inductor
("compiled", of the first rows only, since it takes long). Ours and eager also as CUDA graphs. cuDNN
picks its algorithm by measuring. Every candidate is compared with float64 before it is timed.
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
from gpu_rows import DTYPES, OWN, own, run_benchmark, summary, verify
from gpu_timing import Timer, captured

BATCHES = (1, 4)
COMPILED_ROWS = 4


class Layer(NamedTuple):
    """One pair of ERFNet."""

    name: str
    channels: int
    height: int
    width: int
    dilation: int


LAYERS = (
    Layer("64 channels", 64, 128, 256, 1),
    Layer("128, dilation 2", 128, 64, 128, 2),
    Layer("128, dilation 16", 128, 64, 128, 16),
    Layer("16 channels", 16, 256, 512, 1),
)


class Problem(NamedTuple):
    """One row of the table."""

    layer: Layer
    batch: int
    dtype: str
    training: bool

    @property
    def flop(self) -> float:
        """Floating-point operations; training also reverses both and computes the first again."""
        layer = self.layer
        line = 2.0 * self.batch * layer.height * layer.width * layer.channels**2 * 3
        return (7 if self.training else 2) * line


class Inputs(NamedTuple):
    """Tensors of a problem."""

    x: Tensor  # [N, C, H, W]
    w_first: Tensor  # [C, C, 3, 1]
    b_first: Tensor  # [C]
    w_second: Tensor  # [C, C, 1, 3]
    b_second: Tensor  # [C]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    grad_y: Tensor  # [N, C, H, W]


def problems() -> Iterator[Problem]:
    """The most telling rows first, since the time may not reach for all."""
    for batch in BATCHES:
        for dtype in DTYPES:
            for training in (False, True):
                for layer in LAYERS:
                    yield Problem(layer, batch, dtype, training)


def with_compile(problem: Problem) -> bool:
    """Whether Inductor's time is measured too."""
    return problem in list(problems())[:COMPILED_ROWS]


def make_inputs(problem: Problem, device: str) -> Inputs:
    """Random tensors whose results are near one, channels_last."""
    layer, dtype = problem.layer, DTYPES[problem.dtype]
    shape = (problem.batch, layer.channels, layer.height, layer.width)
    x, grad_y = torch.randn(shape, device=device), torch.randn(shape, device=device)
    weights = [
        torch.randn(layer.channels, layer.channels, *taps, device=device)
        / (3 * layer.channels) ** 0.5
        for taps in ((3, 1), (1, 3))
    ]
    x, grad_y, first, second = (
        t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y, *weights)
    )
    vectors = torch.randn(4, layer.channels, device=device)
    b_first, b_second, scale, shift = vectors.unbind()
    inputs = (x, first, b_first, second, b_second, scale, shift, grad_y)
    return Inputs(*(t.to(dtype) for t in inputs))


def ours(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """The operator itself, on the backend that the caller forces."""
    options = dict(dilation=problem.layer.dilation, outer=None if problem.training else "relu")
    *tensors, scale, shift, _ = inputs

    def call() -> Tensor:
        return pyeff.ops.factorized_conv2d(*tensors, scale=scale, shift=shift, **options)

    return call


def composed(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """Two convolutions, relu, scale and shift, relu; in training no last relu, as before a norm."""
    d, training = problem.layer.dilation, problem.training
    x, w_first, b_first, w_second, b_second, scale, shift, _ = inputs

    def call() -> Tensor:
        middle = F.conv2d(x, w_first, b_first, padding=(d, 0), dilation=(d, 1)).relu()
        y = F.conv2d(middle, w_second, b_second, padding=(0, d), dilation=(1, d))
        y = torch.addcmul(shift[:, None, None], y, scale[:, None, None])
        return y if training else y.relu()

    return call


def with_gradients(call: Callable[[], Tensor], inputs: Inputs) -> Callable[[], list[Tensor]]:
    """Forward, then the gradients of x, the weights and the biases."""

    def run() -> list[Tensor]:
        y = call()
        return [y, *torch.autograd.grad(y, inputs[:5], inputs.grad_y)]

    return run


def eager_candidates(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The candidates that need neither capture nor compiler."""
    if not problem.training:
        return {"ours": ours(problem, inputs), "eager": composed(problem, inputs)}
    for leaf in inputs[:5]:
        leaf.requires_grad_()
    return {
        "ours": with_gradients(ours(problem, inputs), inputs),
        "eager": with_gradients(composed(problem, inputs), inputs),
    }


def expected_results(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The same in float64: y, and in training the gradients."""
    wide = Inputs(*(t.detach().double() for t in inputs))
    if not problem.training:
        return [composed(problem, wide)()]
    for leaf in wide[:5]:
        leaf.requires_grad_()
    return with_gradients(composed(problem, wide), wide)()


def measure(problem: Problem, timer: Timer) -> dict[str, object]:
    """One row: what was asked and the times of every candidate."""
    inputs = make_inputs(problem, "cuda")
    torch.backends.cudnn.benchmark = False  # not worth it for the float64 convolutions
    expected = expected_results(problem, inputs)
    torch.backends.cudnn.benchmark = True
    candidates = eager_candidates(problem, inputs)
    candidates = {**own(candidates.pop("ours")), **candidates}
    graphs = [name for name in candidates if name in (*OWN, "eager")]
    candidates |= {f"{name}, graph": captured(candidates[name]) for name in graphs}
    if with_compile(problem):
        candidates["compiled"] = torch.compile(composed(problem, inputs))
    for name, call in candidates.items():
        verify(problem, name, call(), expected)
    found = summary(problem.flop, timer.measure(candidates))
    return {**problem._asdict(), "layer": problem.layer._asdict(), **found}


if __name__ == "__main__":
    run_benchmark("gpu_factorized_conv2d", __doc__, problems(), measure)
