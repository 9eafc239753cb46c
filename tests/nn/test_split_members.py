"""A pair that ``factorize`` split runs in few calls, and computes what its layers do."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyeff.compress import factorize
from pyeff.nn import FactorizedConv2d
from pyeff.nn.folding import layers_apart

SPLITS = {"first": {"first": 4}, "second": {"second": 3}, "both": {"first": 4, "second": 3}}


def pair(split, **options):
    """A pair with settled norms, and its members factored."""
    torch.manual_seed(0)
    options = {"padding": "same", "rank": 7, "norm": "both", **options}
    layer = FactorizedConv2d(6, 6, 3, **options)
    for norm in (layer.norm_inner, layer.norm_outer):
        if norm is not None:
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return factorize(layer.double().eval(), rank=SPLITS[split], form="channel", only_if="always")


def image():
    return torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1)).double()


def apart(layer, x, **ends):
    with layers_apart():
        return layer(x, **ends)


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm", [None, "inner", "outer", "both"])
@pytest.mark.parametrize("split", SPLITS)
def test_it_computes_what_its_layers_do(split, norm, grad):
    layer, x = pair(split, norm=norm), image()
    with torch.set_grad_enabled(grad):
        for ends in ({}, {"outer": "silu"}, {"residual": x, "outer": "relu"}):
            torch.testing.assert_close(
                layer(x, **ends), apart(layer, x, **ends), rtol=1e-12, atol=1e-12
            )
    assert torch.equal(x, image())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "options",
    [
        {"order": "horizontal_first", "stride": 2},
        {"dilation": 2, "inner": "silu", "bias": False},
        {"inner": None, "norm": None},
        {"padding": 0, "inner": "relu6"},
    ],
    ids=str,
)
def test_every_kind_of_pair(split, options):
    layer, x = pair(split, **options), image()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), apart(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [None, "outer", "both"])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_and_training(split, norm):
    layer, x = pair(split, norm=norm), image().requires_grad_()
    for training in (False, True):
        layer.train(training)
        found = []
        for run in (lambda: layer(x, outer="relu"), lambda: apart(layer, x, outer="relu")):
            before = copy.deepcopy(layer.state_dict())
            out = run().square().sum()
            found.append(torch.autograd.grad(out, [x, *layer.parameters()]))
            layer.load_state_dict(before)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("split", "fused", "convolutions"), [("second", 1, 1), ("both", 0, 4)])
def test_norms_are_folded_and_what_can_be_fused_is(split, fused, convolutions):
    layer, x = pair(split), image()
    with torch.no_grad():
        layer(x, outer="relu")
        with Calls() as calls:
            layer(x, outer="relu")
    names = " ".join(calls.names)
    assert names.count("factorized_conv2d") == fused
    assert names.count("aten::convolution") == convolutions
    assert "batch_norm" not in names


def test_folded_weights_follow_the_layers():
    layer, x = pair("both"), image()
    with torch.no_grad():
        layer(x)
        layer.second[1].weight.mul_(2)
        layer.norm_inner.running_var.mul_(3)
        torch.testing.assert_close(layer(x), apart(layer, x), rtol=1e-12, atol=1e-12)


def test_hooks_are_called():
    layer, x, seen = pair("both"), image(), []
    wanted = layer(x)
    layer.second[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert seen == [1]


def test_other_members_are_called_as_layers():
    layer, x = pair("second"), image()
    layer.second[1] = nn.Sequential(layer.second[1], nn.Tanh())
    torch.testing.assert_close(layer(x), apart(layer, x), rtol=1e-12, atol=1e-12)
    layer = pair("second")
    layer.second[1] = nn.Conv2d(3, 6, 3, padding=1).double()
    torch.testing.assert_close(layer(x), apart(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_one_graph(split):
    layer, x = pair(split), image()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, outer="relu"), layer(x, outer="relu"))
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))
