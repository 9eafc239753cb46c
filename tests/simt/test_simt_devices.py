"""Tensors on different devices: refused by every call of a kernel, whichever tensor it is."""

import importlib

import pytest
import torch
from ops.stage_cases import CASES as STAGES

import pyeff
from pyeff import ops

OPERATORS = (
    "branch_conv2d",
    "branch_stage",
    "combine",
    "factorized_conv2d",
    "nested_conv2d",
    "top_k_routes",
)
# They look at sizes, and launch nothing.
QUESTIONS = {"factorized_conv2d_fits_cuda", "factorized_conv2d_partial_elements_cuda"}


class Recorder:
    """The native module, and every call of a kernel that went through it."""

    def __init__(self, native):
        self.native, self.calls = native, []

    def __getattr__(self, name):
        function = getattr(self.native, name)
        if not name.endswith("_cuda") or name in QUESTIONS:
            return function

        def call(*arguments):
            self.calls.append((name, function, arguments))
            return function(*arguments)

        return call


@pytest.fixture
def recorder(simt, monkeypatch):
    recorder = Recorder(simt)
    for operator in OPERATORS:
        backend = importlib.import_module(f"pyeff.ops._{operator}_cuda")
        monkeypatch.setattr(backend, "native", recorder)
    return recorder


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def nested():
    x, weight, bias = leaf(2, 6, 5, 5), leaf(8, 8, 3, 3), leaf(8)
    index = torch.tensor([5, 0, 3])
    options = dict(in_range=(0, 6), out_index=index, padding=1)
    return ops.nested_conv2d(x, weight, bias, **options)


def depthwise():
    x, weight, bias = leaf(2, 6, 5, 5), leaf(8, 1, 3, 3), leaf(8)
    options = dict(in_range=(0, 6), out_range=(0, 6), padding=1, groups=8)
    return ops.nested_conv2d(x, weight, bias, **options)


def branches():
    routes = ops.top_k_routes(leaf(3, 4), 2)
    y = ops.branch_conv2d(leaf(3, 8, 5, 5), leaf(4, 8, 8, 3, 3), leaf(4, 8), routes, padding=1)
    return ops.combine(y.mean((3, 4)), leaf(4, 5, 8), leaf(5), routes)


def stage():
    return ops.branch_stage(*STAGES["CIFAR stage, strided, projection"].make(torch.float32))


def pair():
    x, y = leaf(1, 8, 9, 9), leaf(1, 8, 9, 9)
    weights = (leaf(8, 8, 3, 1), leaf(8), leaf(8, 8, 1, 3), leaf(8))
    ends = dict(scale=torch.rand(8), shift=torch.rand(8), residual=y.detach())
    with torch.no_grad():
        ops.factorized_conv2d(x, *weights, padding=1, inner="relu", **ends)
    return ops.factorized_conv2d(x, *weights, padding=1, stride=2, inner="relu")


@pytest.mark.parametrize("run", [nested, depthwise, branches, stage, pair])
def test_a_tensor_elsewhere_is_refused(simt, recorder, run):
    torch.manual_seed(0)
    with pyeff.backend("cuda"):
        y = run()
        if y.requires_grad:
            y.square().sum().backward()
    assert recorder.calls
    for name, function, arguments in recorder.calls:
        places = [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
        assert len(places) > 1, name
        for place in places:
            mixed = list(arguments)
            mixed[place] = simt.Elsewhere(mixed[place], 1)
            simt.forget_launches()
            with pytest.raises(ValueError, match="must be on the device of"):
                function(*mixed)
            assert simt.launches() == [], f"{name}, argument {place}"
