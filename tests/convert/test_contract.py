"""contract: the plain network back, and a report of how far the outputs moved."""

import copy
import json
import re

import pytest
import torch
from models.model_cases import randomise_norms
from torch import nn

import pyeff
from pyeff import models
from pyeff.convert import contract, contract_with_report, expand, linearise
from pyeff.nn import DiverseBranchBlock, ExpandedConv2d, ExpandedLinear, RepVGGBlock


class Net(nn.Module):
    """Everything that contracts, in one network."""

    def __init__(self, activation=None):
        super().__init__()
        chain = {"activation": activation}
        self.stem = ExpandedConv2d(3, 8, 7, 2, 3, **chain)
        self.norm = nn.BatchNorm2d(8)
        self.depth = ExpandedConv2d(8, 8, 3, padding=1, groups=8, bias=False, **chain)
        self.vgg = RepVGGBlock(8, 8, padding=1)
        self.diverse = DiverseBranchBlock(8, 6, padding=1, stride=2)
        self.hidden = ExpandedLinear(6, 5, **chain)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.vgg(torch.relu(self.depth(x))))
        return self.hidden(torch.relu(self.diverse(x)).mean((2, 3)))


PLAIN = {
    "stem": "Conv2d",
    "norm": "BatchNorm2d",
    "depth": "Conv2d",
    "vgg": "Conv2d",
    "diverse": "Conv2d",
    "hidden": "Linear",
}


def net(**options):
    return randomise_norms(Net(**options)).eval()


def images():
    return torch.randn(2, 3, 13, 12)


def kinds(model):
    return {name: type(layer).__name__ for name, layer in model.named_children()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_expanded_layer_becomes_a_plain_one(dtype):
    model, x = net().to(dtype), images().to(dtype)
    before = copy.deepcopy(model.state_dict())
    small, report = contract_with_report(model, x)
    assert kinds(small) == PLAIN
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert kinds(model)["stem"] == "ExpandedConv2d"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    limit = 100 * torch.finfo(dtype).eps
    assert report.precision == "float64"
    assert report.tolerance == limit
    # Exact in float64; else the rounding of the weights, far below what would be an error.
    assert report.relative < (1e-12 if dtype is torch.float64 else limit / 10)
    assert [layer.name for layer in report.layers] == ["stem", "depth", "vgg", "diverse", "hidden"]
    assert all(layer.relative <= report.relative + limit / 10 for layer in report.layers)
    assert report.worst == max(report.layers, key=lambda layer: layer.relative).name
    with torch.no_grad():
        scale = model(x).abs().max()
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=limit * scale)


def test_the_report_tells_what_became_of_the_layers():
    model = net()
    small, report = contract_with_report(model, images())
    assert report.parameters == tuple(
        sum(p.numel() for p in m.parameters()) for m in (model, small)
    )
    stem = report.layers[0]
    assert (stem.kind, stem.params_after) == ("ExpandedConv2d", 8 * 3 * 49 + 8)
    assert stem.params == sum(p.numel() for p in model.stem.parameters())
    text = str(report)
    assert f"contract: 5 layers, {report.parameters[0]:,} -> {report.parameters[1]:,}" in text
    assert "output on the example (float64): differs by" in text
    assert "tolerance 1e-05" in text
    assert f"largest difference of a layer: {report.worst}" in text
    assert json.loads(json.dumps(report.to_json()))["worst"] == report.worst
    without = contract_with_report(model)[1]
    assert without.relative is without.worst is without.layers[0].relative is None
    assert "output" not in str(without)


class WrongContraction(ExpandedConv2d):
    """What an implementation that loses a bias would be."""

    def contract(self):
        conv = super().contract()
        with torch.no_grad():
            conv.bias.add_(0.01)
        return conv


def test_a_wrong_contraction_is_found_with_its_layer():
    model, x = net(), images()
    model.stem = WrongContraction(3, 8, 7, 2, 3)
    assert kinds(contract(model)) == PLAIN
    with pytest.raises(ValueError, match=r"contract: outputs must differ by no more than") as error:
        contract(model.eval(), x)
    assert "the layer that differs most is 'stem', " in str(error.value)
    assert contract_with_report(model, x, tolerance=1.0)[1].worst == "stem"


def test_members_are_run_one_by_one_for_the_comparison():
    """In eval mode the layers themselves run contracted, which would be compared with itself."""
    seen = []
    model = net()
    x = images()
    model.stem.members[0].register_forward_hook(lambda *_: seen.append(1))
    model.vgg.branches["point"].conv.register_forward_hook(lambda *_: seen.append(2))
    contract(model, x)
    assert set(seen) == {1, 2}


def test_networks_without_expanded_layers_are_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    same, report = contract_with_report(model, torch.randn(1, 3, 5, 5))
    assert same is not model
    assert torch.equal(same[0].weight, model[0].weight)
    assert report.layers == ()
    assert report.relative is report.worst is None


class OnlySingle(nn.Module):
    """A network that makes a tensor of a fixed precision within."""

    def __init__(self):
        super().__init__()
        self.conv = ExpandedConv2d(3, 4, 5)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) @ torch.eye(4)


def test_networks_that_cannot_run_in_double_precision_are_compared_in_their_own():
    report = contract_with_report(OnlySingle(), torch.randn(2, 3, 7, 7))[1]
    assert report.precision == "float32"
    assert report.tolerance == 1000 * torch.finfo(torch.float32).eps
    assert report.relative < report.tolerance / 100


def test_modes_and_frozen_layers_are_kept():
    model = net()
    model.depth.train().requires_grad_(False)
    small = contract(model)
    assert small.depth.training
    assert not small.stem.training
    assert not any(p.requires_grad for p in small.depth.parameters())
    assert all(p.requires_grad for p in small.stem.parameters())


@pytest.mark.parametrize("expand_as", ["cl", "ck", "ck+fc"])
def test_families_are_the_plain_network_again(expand_as, tmp_path):
    large, plain = models.smallnet(expand=expand_as).eval(), models.smallnet()
    x = torch.randn(2, 3, 32, 32)
    small = contract(large, x)
    assert small.config == plain.config
    plain.load_state_dict(small.state_dict())
    pyeff.save(small, tmp_path / "net.safetensors")
    again = pyeff.load(tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_families_with_other_biases_are_described(tmp_path):
    """Blocks bring biases that the plain network does not have."""
    model = models.build({"family": "backbone", "name": "resnet8", "classes": 5})
    small = contract(randomise_norms(expand(model, mode="repvgg")).eval())
    assert small.config["family"] == "compressed"
    pyeff.save(small, tmp_path / "net.safetensors")
    again, x = pyeff.load(tmp_path / "net.safetensors"), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_nonlinear_networks_start_linear_ones():
    model, x = net(activation="relu"), images()
    with pytest.raises(ValueError, match=r"contract: layer 'stem' must equal a plain one, got"):
        contract(model)
    linear = linearise(model)
    assert model.stem.activation == "relu"
    assert linear.stem.activation is linear.hidden.activation is None
    for key, value in model.state_dict().items():
        assert torch.equal(linear.state_dict()[key], value)
    with torch.no_grad():
        assert (linear(x) - model(x)).abs().max() > 1e-3
    assert kinds(contract(linear, x)) == PLAIN


def test_linear_families_know_that_they_are_linear(tmp_path):
    model = models.smallnet(expand="ck", activation="relu")
    linear = linearise(model)
    assert linear.config == {**model.config, "activation": None}
    pyeff.save(linear, tmp_path / "net.safetensors")
    assert pyeff.load(tmp_path / "net.safetensors").conv1.activation is None
    foreign = expand(nn.Sequential(nn.Conv2d(3, 4, 5)), activation="relu")
    assert foreign.compressed_layers["0"]["activation"] == "relu"
    assert linearise(foreign).compressed_layers["0"]["activation"] is None
    base = nn.Sequential(ExpandedConv2d(3, 4, 5, activation="relu"))
    assert linearise(base).compressed_layers["0"]["activation"] is None


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, ([],), "contract: model must be an nn.Module, got list"),
        (TypeError, (Net(), "x"), "contract: example must be a tensor or a sequence of tensors"),
        (
            ValueError,
            (Net(), torch.randn(1, 4, 9, 9)),
            "contract: example must be an input that the model takes, got [[1, 4, 9, 9]]",
        ),
    ],
)
def test_errors_are_in_words(error, arguments, message):
    with pytest.raises(error, match=re.escape(message)):
        contract(*arguments)


def test_more_errors_in_words():
    with pytest.raises(ValueError, match="contract: tolerance must not be negative, got -1"):
        contract(Net(), tolerance=-1)
    with pytest.raises(TypeError, match=r"linearise: model must be an nn.Module, got int"):
        linearise(3)
    with pytest.raises(ValueError, match="linearise: model must have expanded layers with an act"):
        linearise(Net())
    model = net()
    model.vgg.branches["conv"].norm.running_mean[0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 'vgg' must equal .* statistics must be finite"):
        contract(model)
    model = net()
    model.stem.members[1] = nn.Sequential(nn.Conv2d(12, 8, 1), nn.Conv2d(8, 32, 3))
    with pytest.raises(ValueError, match=r"layer 'stem' must equal a plain one"):
        contract(model)
