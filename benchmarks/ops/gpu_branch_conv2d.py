"""branch_conv2d, our kernels, against what a user of cuDNN would run, on the GPU of this machine.

Layers of HydraNet branches: the first reads one map for all branches of an image, the others read
one for each (image, branch) pair. Candidates, forward and training (forward and all three
gradients): ours in Triton and in CUDA C++; the gathered weights in one grouped convolution
("gathered", in NCHW, which suits it better); a loop over the branches ("loop", one wait for the
host); all branches at once, of which the chosen are kept ("dense"). Ours, gathered and dense also
as CUDA graphs; the loop cannot be one. cuDNN picks its algorithm by measuring. Every candidate is
compared with float64 before it is timed.
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

BATCHES = (32, 1, 128)
BRANCHES = (20, 50)
ROUTES = 4


class Layer(NamedTuple):
    """One convolution of a branch."""

    name: str
    inputs: int
    outputs: int
    pixels: int
    kernel: int
    stride: int
    shared: bool  # the first of its branch


LAYERS = (
    Layer("first, strided", 32, 64, 16, 3, 2, True),
    Layer("3x3", 64, 64, 8, 3, 1, False),
    Layer("first, 1x1", 256, 64, 14, 1, 1, True),
    Layer("wide 3x3", 128, 128, 14, 3, 1, False),
)


class Problem(NamedTuple):
    """One row of the table."""

    layer: Layer
    branches: int
    batch: int
    dtype: str
    training: bool

    @property
    def flop(self) -> float:
        """Floating-point operations of k branches; training is three convolutions of a size."""
        side = self.layer.pixels // self.layer.stride
        terms = self.layer.inputs * self.layer.kernel**2
        one = 2.0 * self.batch * ROUTES * side**2 * self.layer.outputs * terms
        return 3 * one if self.training else one


class Inputs(NamedTuple):
    """Tensors of a problem."""

    x: Tensor  # [N, C, H, W] or [N, k, C, H, W]
    weight: Tensor  # [B, O, C, r, r]
    bias: Tensor  # [B, O]
    grad_y: Tensor  # [N, k, O, P, P]
    index: Tensor  # int32 [N, k]


def problems() -> Iterator[Problem]:
    """The most telling rows first, since the time may not reach for all."""
    for batch in BATCHES:
        for branches in BRANCHES:
            for dtype in DTYPES:
                for training in (False, True):
                    for layer in LAYERS:
                        yield Problem(layer, branches, batch, dtype, training)


def innermost(tensor: Tensor) -> Tensor:
    """The same with channels innermost in memory."""
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


def make_inputs(problem: Problem, device: str) -> Inputs:
    """Random tensors whose results are near one, channels innermost; a gate's random routes."""
    layer, n, branches = problem.layer, problem.batch, problem.branches
    dtype = DTYPES[problem.dtype]
    outer = (n,) if layer.shared else (n, ROUTES)
    side = layer.pixels // layer.stride
    x = torch.randn(*outer, layer.inputs, layer.pixels, layer.pixels, device=device)
    shape = (branches, layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    weight = torch.randn(shape, device=device) * (layer.inputs * layer.kernel**2) ** -0.5
    bias = torch.randn(branches, layer.outputs, device=device)
    grad_y = torch.randn(n, ROUTES, layer.outputs, side, side, device=device)
    index = torch.rand(n, branches, device=device).topk(ROUTES, dim=1).indices.to(torch.int32)
    tensors = (innermost(x), innermost(weight), bias, innermost(grad_y))
    return Inputs(*(t.to(dtype) for t in tensors), index)


def ours(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """The operator itself, on the backend that the caller forces."""
    layer, (x, weight, bias, _, index) = problem.layer, inputs

    def call() -> Tensor:
        return pyeff.ops.branch_conv2d(
            x, weight, bias, index, stride=layer.stride, padding=layer.kernel // 2
        )

    return call


def gathered(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """A copy of the weights for every pair, and one convolution of N * k groups."""
    layer, (x, weight, bias, _, index) = problem.layer, inputs
    n, k = index.shape

    def call() -> Tensor:
        branches = index.flatten().long()
        maps = x.unsqueeze(1).expand(-1, k, -1, -1, -1) if layer.shared else x
        y = F.conv2d(
            maps.reshape(1, -1, *x.shape[-2:]),
            weight[branches].flatten(0, 1),
            bias[branches].flatten(),
            stride=layer.stride,
            padding=layer.kernel // 2,
            groups=n * k,
        )
        return y.view(n, k, layer.outputs, *y.shape[-2:])

    return call


def loop(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """One convolution per branch on its images; how many they are, the host has to ask."""
    layer, (x, weight, bias, _, index) = problem.layer, inputs
    n, k = index.shape

    def call() -> Tensor:
        branches = index.flatten().long()
        order = branches.argsort(stable=True)
        counts = torch.bincount(branches, minlength=problem.branches).tolist()
        rows = x if layer.shared else x.flatten(0, 1)
        results = [
            F.conv2d(
                rows[pairs // k if layer.shared else pairs],
                weight[b],
                bias[b],
                stride=layer.stride,
                padding=layer.kernel // 2,
            )
            for b, pairs in enumerate(order.split(counts))
            if counts[b]
        ]
        y = torch.cat(results)
        return y.new_empty(y.shape).index_copy(0, order, y).view(n, k, *y.shape[1:])

    return call


def untuned(call: Callable[[], object]) -> Callable[[], object]:
    """Without cuDNN's search for algorithms: a loop's batches differ from branch to branch."""

    def run() -> object:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False
        try:
            return call()
        finally:
            torch.backends.cudnn.benchmark = before

    return run


def dense(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """All branches on all images, in one convolution; the chosen are kept."""
    layer, (x, weight, bias, _, index) = problem.layer, inputs
    n, branches = index.shape[0], problem.branches
    images = torch.arange(n, device=index.device)[:, None]

    def call() -> Tensor:
        chosen = index.long()
        maps = x
        if not layer.shared:  # zeros for the branches that were not chosen
            maps = x.new_zeros(n, branches, *x.shape[2:]).index_put((images, chosen), x)
            maps = maps.flatten(1, 2)
        y = F.conv2d(
            maps,
            weight.flatten(0, 1),
            bias.flatten(),
            stride=layer.stride,
            padding=layer.kernel // 2,
            groups=1 if layer.shared else branches,
        )
        return y.unflatten(1, (branches, layer.outputs))[images, chosen]

    return call


def eager_candidates(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The candidates that need no capture."""
    leading = Inputs(*(t.contiguous() for t in inputs))  # NCHW
    ways = {
        "ours": (ours, inputs),
        "gathered": (gathered, leading),
        "loop": (loop, inputs),
        "dense": (dense, inputs),
    }
    candidates: dict[str, Callable[[], object]] = {}
    for name, (way, tensors) in ways.items():
        if problem.training:
            for leaf in tensors[:3]:
                leaf.requires_grad_()
            candidates[name] = with_gradients(way(problem, tensors), tensors)
        else:
            candidates[name] = way(problem, tensors)
    candidates["loop"] = untuned(candidates["loop"])
    return candidates


def expected_results(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The same in float64: y, and in training the gradients of x, weight and bias."""
    wide = Inputs(*(t.detach().double() for t in inputs[:4]), inputs.index)
    if problem.training:
        for leaf in wide[:3]:
            leaf.requires_grad_()
        return with_gradients(loop(problem, wide), wide)()
    return [loop(problem, wide)()]


def measure(problem: Problem, timer: Timer) -> dict[str, object]:
    """One row: what was asked and the times of every candidate."""
    inputs = make_inputs(problem, "cuda")
    torch.backends.cudnn.benchmark = False  # not worth it for the float64 convolutions
    expected = expected_results(problem, inputs)
    torch.backends.cudnn.benchmark = True
    candidates = eager_candidates(problem, inputs)
    candidates = {**own(candidates.pop("ours")), **candidates}
    graphs = [name for name in candidates if name in (*OWN, "gathered", "dense")]
    candidates |= {f"{name}, graph": captured(candidates[name]) for name in graphs}
    for name, call in candidates.items():
        verify(problem, name, call(), expected)
    found = summary(problem.flop, timer.measure(candidates))
    return {**problem._asdict(), "layer": problem.layer._asdict(), **found}


if __name__ == "__main__":
    run_benchmark("gpu_branch_conv2d", __doc__, problems(), measure)
