"""A description holds what a compressed network is, and nothing that could be executed."""

import copy
import json

import pytest
import torch
from torch import nn

import pyeff
from pyeff.compress import factorize
from pyeff.compress.saved import carry_description, load, save
from pyeff.models.described import apply_description, describe
from pyeff.nn import ConvNorm2d, FactorizedConv2d


class Scaled(nn.Module):
    """A layer of a class that no description knows, with a parameter of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.conv(x) * self.scale


class SameConv(nn.Conv2d):
    """A subclass, as timm has them."""


LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), 1, 2, False),
    "padding by name": lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False, dilation=1),
    "linear": lambda: nn.Linear(4, 6, bias=False),
    "batch norm": lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=None, affine=False),
    "layer norm": lambda: nn.LayerNorm(6, bias=False),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "prelu": lambda: nn.PReLU(6),
    "identity": nn.Identity,
    "sequence": lambda: nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.GELU("tanh")),
    "pair": lambda: FactorizedConv2d(4, 6, 3, 2, 1, rank=5, norm="both", norm_eps=1e-3),
    "linear pair": lambda: FactorizedConv2d(4, 6, 3, padding=1, rank=2, inner=None),
    "conv with norm": lambda: ConvNorm2d(nn.Conv2d(4, 6, 3, bias=False), 1e-3),
}


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_rebuilt_from_json(make):
    base = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    model = nn.Sequential(make(), nn.ReLU())
    layers = json.loads(json.dumps(describe(model, base)))
    again = apply_description(base, layers)
    assert str(again) == str(model)
    assert shapes(again) == shapes(model)
    assert describe(again, base) == layers
    assert set(layers) == {"0"}


def test_the_base_is_not_changed_and_equal_layers_are_not_told():
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    before = shapes(base)
    assert describe(base, copy.deepcopy(base)) == {}
    layers = describe(model, base)
    assert set(layers) == {"0", "1"}
    assert layers["1"]["num_features"] == 5
    assert shapes(apply_description(base, layers)) == shapes(model)
    assert shapes(base) == before


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, channels):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 1)
        self.inner = nn.Sequential(nn.ReLU(), self.one)
        self.two = self.one

    def forward(self, x):
        return self.two(self.inner(self.one(x)))


@pytest.mark.parametrize("factored", [False, True])
def test_a_layer_of_several_names_stays_one(factored, tmp_path):
    base, model = Twice(6), Twice(4)
    if factored:
        model = factorize(Twice(6), rank=2)
    else:
        carry_description(model, base)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", base=base)
    assert again.one is again.two is again.inner[1]
    assert base.one is base.two
    x = torch.randn(1, 6 if factored else 4, 3, 3)
    torch.testing.assert_close(again(x), model(x))
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_unknown_classes_keep_their_class_and_are_resized():
    base, model = Scaled(8), Scaled(5)
    layers = describe(model, base)
    assert layers[""]["kind"] == "resized"
    again = apply_description(base, layers)
    assert type(again) is Scaled
    assert shapes(again) == shapes(model)
    base = SameConv(3, 8, 3)
    small = apply_description(base, describe(SameConv(3, 5, 3, bias=False), base))
    assert type(small) is SameConv
    assert (small.out_channels, small.bias) == (5, None)
    assert torch.isfinite(small.weight).all()


def test_a_member_that_its_layer_would_not_make_is_told():
    pair = FactorizedConv2d(4, 6, 3, padding=1, rank=2, inner=None)
    pair.first.bias = nn.Parameter(torch.ones(2))
    layers = describe(nn.Sequential(pair), nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)))
    again = apply_description(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), layers)
    assert again[0].first.bias.shape == (2,)


def test_layers_come_in_the_mode_precision_and_place_of_the_base():
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5)).double().eval()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.1))
    again = apply_description(base, describe(model, base))
    assert again[0].weight.dtype == torch.float64
    assert not again[1].training
    assert again[1].p == 0.1


def test_a_replacement_without_a_kind_is_refused():
    with pytest.raises(ValueError, match=r"describe: layer '0' must be of a kind .* got LSTM"):
        describe(nn.Sequential(nn.LSTM(2, 2)), nn.Sequential(nn.Identity()))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"9": {"kind": "Identity"}}, "must name modules of the base, got '9'"),
        ({"0": {"kind": "os.system", "command": "ls"}}, "must have a kind of"),
        ({"0": {"kind": "__class__"}}, "must have a kind of"),
        ({"0": "Identity"}, "must have a kind of"),
        ({"0": {"kind": "Identity", "device": "x"}}, "got device"),
        ({"0": {"kind": "Linear", "in_features": "two", "out_features": 2}}, "that can be made"),
        ({"0": {"kind": "Linear"}}, "that can be made"),
        ({"0": {"kind": "Sequential", "items": 3}}, "must have a list of items"),
        ({"0": {"kind": "Sequential", "items": [{"kind": "resized"}]}}, "layer of its own"),
        ({"0": {"kind": "resized", "sizes": {"forward": 3}}}, "got forward"),
        ({"0": {"kind": "resized", "tensors": {"nothing": [3]}}}, "got nothing"),
        ([], "must be a mapping"),
    ],
)
def test_descriptions_that_cannot_be_followed(layers, message):
    with pytest.raises(ValueError, match=message):
        apply_description(nn.Sequential(nn.Conv2d(3, 8, 3)), layers)


def small_resnet():
    return pyeff.models.build_backbone("resnet8", 4, widths=[8, 8, 8])


def narrowed(model):
    """The network with fewer channels inside its first block."""
    made = copy.deepcopy(model)
    block = made.blocks[0]
    block.conv1, block.norm2 = nn.Conv2d(8, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
    block.conv2 = nn.Conv2d(5, 8, 3, padding=1, bias=False)
    return made


def test_a_network_of_ours_is_saved_and_loaded_whole(tmp_path):
    model = small_resnet()
    small = narrowed(model)
    carry_description(small, model)
    assert small.config["family"] == "compressed"
    assert small.config["base"] == model.config
    pyeff.save(small, tmp_path / "m.safetensors")
    again = pyeff.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), small.eval()(x))
    assert again.config == small.config
    fresh = pyeff.models.build(small.config)
    assert shapes(fresh) == shapes(small)
    # He initialisation, as the base has it.
    assert float(fresh.blocks[0].conv1.weight.detach().std()) == pytest.approx(
        (2 / 45) ** 0.5, rel=0.2
    )


def test_what_was_compressed_twice_is_described_from_its_base():
    model = small_resnet()
    once = narrowed(model)
    carry_description(once, model)
    twice = copy.deepcopy(once)
    block = twice.blocks[0]
    block.conv1 = nn.Sequential(nn.Conv2d(8, 2, 3, padding=1, bias=False), nn.Conv2d(2, 5, 1))
    carry_description(twice, once)
    thrice = copy.deepcopy(twice)
    thrice.blocks[0].conv1[0] = nn.Conv2d(8, 1, 3, padding=1, bias=False)
    thrice.blocks[0].conv1[1] = nn.Conv2d(1, 5, 1)
    carry_description(thrice, twice)
    assert thrice.config["base"] == model.config
    assert "blocks.0.conv1.0" not in thrice.config["layers"]
    assert shapes(pyeff.models.build(thrice.config)) == shapes(thrice)


def test_networks_of_others_are_loaded_into_their_base(tmp_path):
    base, model = Scaled(8), Scaled(5)
    carry_description(model, base)
    save(model, tmp_path / "m.safetensors", extra={"note": 1})
    again = load(tmp_path / "m.safetensors", base=Scaled(8))
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(again(x), model(x))
    save(again, tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match=r"must be resized by what Linear has, got .*scale"):
        load(tmp_path / "m.safetensors", base=nn.Linear(2, 2))
    pyeff.save(small_resnet(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must be written by compress\.save, got 'model'"):
        load(tmp_path / "other.safetensors", base=Scaled(8))
    with pytest.raises(TypeError, match=r"must come from shrink or factorize, got Scaled"):
        save(base, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"extra must not name kind, layers, got \['layers'\]"):
        save(model, tmp_path / "extra.safetensors", extra={"layers": {}})
    assert not (tmp_path / "extra.safetensors").exists()


class Versioned(nn.Module):
    """A layer that refuses a state dict of an unknown format, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") != 2:
            raise ValueError(metadata.get("version"))
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_the_versions_of_layers_are_kept(tmp_path):
    model = Versioned(4)
    carry_description(model, Versioned(6))
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", base=Versioned(6))
    assert torch.equal(again.conv.weight, model.conv.weight)
