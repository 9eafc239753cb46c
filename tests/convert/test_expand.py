"""expand: which layers become larger, and that the network stays what it was."""

import copy
import json
import re
from fnmatch import fnmatchcase

import pytest
import torch
from models.model_cases import randomise_norms
from torch import nn
from torch.nn.utils import parametrizations

import pyeff
from pyeff import compress, models
from pyeff.convert import contract, expand, expand_with_report
from pyeff.models.described import apply_description
from pyeff.nn import (
    ACBlock,
    DiverseBranchBlock,
    Downsampler,
    ExpandedConv2d,
    ExpandedLinear,
    FactorizedConv2d,
    NonBottleneck1d,
    RepVGGBlock,
)

MODES = ["auto", "cl", "ck", "repvgg", "acnet", "dbb"]


class Net(nn.Module):
    """Layers of every kind that expand looks at."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 6, 1)
        self.hidden = nn.Linear(6, 12)
        self.logits = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.point(self.depth(x))).mean((2, 3))
        return self.logits(torch.relu(self.hidden(x)))


def net():
    return randomise_norms(Net()).eval()


def images():
    return torch.randn(2, 3, 12, 11)


def kinds(model):
    return {name: type(layer).__name__ for name, layer in model.named_children()}


def test_convolutions_of_more_than_a_tap_are_expanded_and_the_model_is_kept():
    model = net()
    before = copy.deepcopy(model.state_dict())
    large, report = expand_with_report(model, rate=2)
    assert kinds(large) == {
        "stem": "ExpandedConv2d",
        "norm": "BatchNorm2d",
        "depth": "ExpandedConv2d",
        "point": "Conv2d",
        "hidden": "Linear",
        "logits": "Linear",
    }
    assert (large.stem.mode, large.stem.widths) == ("ck", (6, 16))
    assert (large.depth.mode, large.depth.widths, large.depth.groups) == ("cl", (16, 16), 8)
    assert all(member.bias is None for member in large.depth.members)
    assert kinds(model) == kinds(net())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not {id(p) for p in model.parameters()} & {id(p) for p in large.parameters()}
    assert report.expanded == ("stem", "depth")
    assert report.parameters == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in large.parameters()),
    )
    text = str(report)
    assert "stem: ck, widths 6, 16, params 1,184 -> " in text
    assert "point: left: a 1 x 1 convolution: ask for it by name" in text
    assert "hidden: left: a linear layer: linear=True expands them" in text
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["name"] == "stem"


def test_linear_layers_but_the_last_where_asked():
    large = expand(net(), linear=True)
    assert isinstance(large.hidden, ExpandedLinear)
    assert type(large.logits) is nn.Linear


def test_names_patterns_and_functions_choose():
    model = net()
    # By name whatever the kind.
    report = expand_with_report(model, layers=["point", "logits"])[1]
    assert report.expanded == ("point", "logits")
    # Patterns choose among what is expanded by default.
    report = expand_with_report(model, layers=["*t*", "p*"])[1]
    assert report.expanded == ("stem", "depth")
    assert fnmatchcase("point", "*t*")
    assert expand_with_report(model, layers=["d*"])[1].expanded == ("depth",)
    seen = []

    def choose(name, layer):
        seen.append(name)
        return isinstance(layer, nn.Linear)

    assert expand_with_report(model, layers=choose)[1].expanded == ("hidden", "logits")
    assert seen == ["stem", "depth", "point", "hidden", "logits"]


def test_options_reach_the_layers():
    large = expand(net(), mode="cl", form="expanded", inner_bias=False, activation="relu")
    assert (large.stem.form, large.stem.activation) == ("expanded", "relu")
    assert [member.bias is None for member in large.stem.members] == [True, True, False]
    large = expand(net(), widths={"stem": (3, 40), "hidden": (7, 9)}, layers=["stem", "hidden"])
    assert (large.stem.widths, large.hidden.widths) == ((3, 40), (7, 9))
    large = expand(net(), mode="dbb", norm_eps=1e-3, inner_channels=16)
    assert large.stem.branches["conv"].norm.eps == 1e-3
    assert large.depth.inner_channels == 16
    types = {"repvgg": RepVGGBlock, "acnet": ACBlock, "dbb": DiverseBranchBlock}
    for mode, kind in types.items():
        assert type(expand(net(), mode=mode).stem) is kind


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_carried_over_where_asked(mode):
    model, x = net().double(), images().double()
    linear = mode in ("auto", "cl", "ck")
    large, report = expand_with_report(
        model, mode=mode, linear=linear, from_compact=True, example=x
    )
    assert report.relative is not None
    assert report.relative < 1e-10
    torch.testing.assert_close(large(x), model(x), rtol=0, atol=1e-10)
    fresh = expand(model, mode=mode, linear=linear)
    assert (fresh(x) - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(contract(large, x)(x), model(x), rtol=0, atol=1e-10)


def test_mode_dtype_device_and_frozen_layers_are_kept():
    model = net().to(torch.bfloat16)
    model.stem.requires_grad_(False)
    model.depth.train()
    for mode in ("auto", "repvgg"):
        for from_compact in (False, True):
            large = expand(model, mode=mode, from_compact=from_compact)
            assert {p.dtype for p in large.parameters()} == {torch.bfloat16}
            assert not any(p.requires_grad for p in large.stem.parameters())
            assert all(p.requires_grad for p in large.depth.parameters())
            assert not large.stem.training
            assert large.depth.training
    meta = expand(net().to("meta"))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


class Subclass(nn.Conv2d):
    """As timm has them."""


class Reader(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.called = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.conv2d(x, self.conv.weight) + self.called(x)


def test_what_cannot_be_replaced_is_left_with_a_reason():
    shared = nn.Conv2d(3, 3, 3)
    shared.weight = nn.Conv2d(3, 3, 3).weight
    tied = nn.Conv2d(3, 3, 3)
    tied.weight = shared.weight
    hooked = nn.Conv2d(3, 3, 3)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(
        Subclass(3, 3, 3),
        shared,
        tied,
        hooked,
        parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
        nn.Conv2d(3, 3, 3),
    )
    large, report = expand_with_report(model)
    assert report.expanded == ("5",)
    reasons = [layer.left for layer in report.layers]
    assert reasons[0] == "a Subclass may compute something else than its base class"
    assert reasons[1] == reasons[2] == "another module has the same weight or bias"
    assert reasons[3] == "it has hooks, which would be lost"
    assert "may compute something else" in reasons[4] or "hook" in reasons[4]
    assert large(torch.randn(1, 3, 15, 15)).shape == (1, 3, 3, 3)
    with pytest.raises(ValueError, match=r"expand: layers must name such .* got '0': a Subclass"):
        expand(model, layers=["0"])
    x = torch.randn(1, 3, 5, 5)
    report = expand_with_report(Reader(), example=x)[1]
    assert report.expanded == ("called",)
    assert report.layers[0].left.startswith("not called on the example")


def test_a_layer_with_two_names_stays_one_layer():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    large = expand(model)
    assert isinstance(large["a"], ExpandedConv2d)
    assert large["a"] is large["b"][0]
    small = contract(large)
    assert type(small["a"]) is nn.Conv2d
    assert small["a"] is small["b"][0]
    alone = expand(layer)
    assert isinstance(alone, ExpandedConv2d)
    assert type(contract(alone)) is nn.Conv2d


def test_members_of_expanded_layers_are_no_candidates():
    once = expand(net())
    twice, report = expand_with_report(once, layers=["point"])
    assert [layer.name for layer in report.layers] == ["point", "hidden", "logits"]
    assert isinstance(twice.stem.members[0], nn.Conv2d)


NETWORKS = {
    "dec3": lambda: models.dec3(8, 5, 3),
    "backbone": lambda: models.build({"family": "backbone", "name": "resnet8", "classes": 5}),
}


@pytest.mark.parametrize("mode", ["auto", "acnet"])
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_train_contract_and_are_saved(name, mode, tmp_path):
    model, x = NETWORKS[name](), torch.randn(2, 3, 32, 32)
    large = expand(model, 2, mode, from_compact=True)
    large(x).square().mean().backward()
    assert all(p.grad is not None for p in large.parameters())
    large.eval()
    small = contract(large, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), large(x), rtol=1e-3, atol=1e-4)
        for network in (large, small):
            pyeff.save(network, tmp_path / "net.safetensors")
            again = pyeff.load(tmp_path / "net.safetensors")
            assert str(again) == str(network)
            assert torch.equal(again(x), network(x))
    if mode == "auto":
        assert small.config == model.config


@pytest.mark.parametrize("mode", MODES)
def test_foreign_networks_are_saved_with_their_description(mode, tmp_path):
    model, x = net(), images()
    large = expand(model, mode=mode, layers=["stem"])
    layers = json.loads(json.dumps(large.compressed_layers))
    assert str(apply_description(net(), layers)) == str(large)
    compress.save(large, tmp_path / "net.safetensors")
    again = compress.load(tmp_path / "net.safetensors", net())
    with torch.no_grad():
        assert torch.equal(again(x), large(x))
    small = contract(large, x)
    if mode in ("auto", "cl", "ck"):
        plain = net()
        plain.load_state_dict(small.state_dict())
        assert torch.equal(plain(x), small(x))


def test_expanded_layers_shrink_and_are_not_factored():
    model = expand(nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 4, 3))).eval()
    with torch.no_grad():
        model[0].members[-1].weight[:3].zero_()
        model[0].members[-1].bias[:3].zero_()
        model[0].members[0].weight[:5].zero_()
        model[0].members[0].bias[:5].zero_()
    x = torch.randn(1, 3, 9, 9)
    small = compress.shrink(model, x)
    assert [m.out_channels for m in small[0].members] == [7, 5]
    torch.testing.assert_close(contract(small, x)(x), model(x))
    message = r"model must be contracted first .* got 2 expanded layers: '0', '2'"
    with pytest.raises(ValueError, match=f"factorize: {message}"):
        compress.factorize(model, rank=2)
    with pytest.raises(ValueError, match=f"LowRank: {message}"):
        compress.LowRank(model, strength=0.1)


@pytest.mark.parametrize("mode", ["ck", "dbb"])
@torch.no_grad()
def test_shrunk_expanded_networks_are_saved_and_contract(mode, tmp_path):
    model, x = expand(models.smallnet(), mode=mode).eval(), torch.randn(1, 3, 32, 32)
    chain = mode == "ck"
    inner = model.conv1.members[-1:] if chain else model.conv1.branches.modules()
    for layer in inner:
        if isinstance(layer, nn.Conv2d):
            layer.weight[:2].zero_()
            if layer.bias is not None:
                layer.bias[:2].zero_()
    shrunk = compress.shrink(model, x)
    small = contract(shrunk, x)
    assert small.conv1.weight.shape == (6, 3, 7, 7)
    for network in (shrunk, small):
        pyeff.save(network, tmp_path / "net.safetensors")
        assert torch.equal(pyeff.load(tmp_path / "net.safetensors")(x), network(x))


# They read the weights of their convolutions, to fold norms or to fuse pairs.
READERS = {
    "pair": lambda: FactorizedConv2d(4, 4, 5, padding=2, norm="both"),
    "pair without norms": lambda: FactorizedConv2d(4, 4, 3, padding=1, inner=None),
    "block of pairs": lambda: NonBottleneck1d(4, dilation=2),
    "dense block": lambda: NonBottleneck1d(4, dense=True),
    "downsampler": lambda: Downsampler(4, 6),
}


@pytest.mark.parametrize("mode", ["cl", "acnet"])
@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_layers_that_read_weights_call_expanded_ones(name, mode):
    layer, x = randomise_norms(READERS[name]()).eval(), torch.randn(2, 4, 8, 8)
    large = expand(layer, mode=mode, from_compact=True)
    torch.testing.assert_close(large(x), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(contract(large, x)(x), layer(x), rtol=1e-4, atol=1e-5)
    assert large.train()(x).shape == layer(x).shape


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"mode": "fc"}, "mode must be one of 'auto', 'cl', 'ck', 'repvgg'"),
        (ValueError, {"rate": 0}, "rate must be positive, got 0"),
        (ValueError, {"layers": ["stme"]}, "must name convolutions or linear layers of the model"),
        (ValueError, {"layers": ["x*"]}, "must name convolutions or linear layers of the model"),
        (TypeError, {"layers": "stem"}, "layers must be several names or patterns, or a function"),
        (TypeError, {"layers": [1]}, "layers must be several names or patterns"),
        (TypeError, {"width": 3}, "options must be among form, inner_bias, widths, activation"),
        (TypeError, {"noise": 0.1}, "and layers with fresh weights, got noise"),
        (
            TypeError,
            {"activation": "relu", "from_compact": True},
            "and layers that keep their function, got activation",
        ),
        (TypeError, {"mode": "acnet", "inner_channels": 8}, "got inner_channels"),
        (TypeError, {"widths": (1, 2)}, "widths must be a mapping of layers' names"),
        (ValueError, {"widths": {"point": (4, 4)}}, "widths must name layers that are expanded"),
        (
            ValueError,
            {"layers": ["stem"], "widths": {"stem": (4,)}},
            "got 'stem': ExpandedConv2d: ",
        ),
        (ValueError, {"layers": ["depth"], "mode": "ck"}, "got 'depth': ExpandedConv2d: kernel_si"),
        (ValueError, {"layers": ["hidden"], "mode": "dbb"}, "mode 'dbb' is for convolutions"),
        (ValueError, {"layers": lambda *_: False}, "model must have a layer that can be expanded"),
        (ValueError, {"example": torch.randn(1, 4, 9, 9)}, "must be an input that the model takes"),
        (TypeError, {"example": 3}, "example must be a tensor or a sequence of tensors, got int"),
    ],
)
def test_errors_are_in_words(error, options, message):
    with pytest.raises(error, match=re.escape(message)) as found:
        expand(net(), **options)
    assert str(found.value).startswith("expand: ")


def test_only_modules_and_such_with_layers():
    with pytest.raises(TypeError, match=r"expand: model must be an nn.Module, got list"):
        expand([])
    with pytest.raises(ValueError, match="neither convolutions nor linear layers"):
        expand(nn.Sequential(nn.ReLU()))
