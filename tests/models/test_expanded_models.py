"""Networks with a plan of expansion: sizes, what the plan expands, contraction, files."""

import importlib
import json
from collections import Counter

import pytest
import torch
from models.model_cases import randomise_norms
from torch import nn
from torchvision_operators import torchvision_loads

import pyeff
from pyeff.convert import contract
from pyeff.models import (
    alexnet_small,
    build,
    mobilenet_v1,
    mobilenet_v2,
    shufflenet_v2_x0_5,
    unet_small,
    yolo_lite,
)
from pyeff.models.expansion import as_it_runs
from pyeff.nn import ExpandedConv2d

MAKERS = (alexnet_small, mobilenet_v1, mobilenet_v2, shufflenet_v2_x0_5, unet_small, yolo_lite)
# Options of a small network, its images' side, the shape of its output.
SMALL = {
    "alexnet_small": (lambda **o: alexnet_small(5, n=128, expand="ck", rate=2, **o), 67, (2, 5)),
    "alexnet_small cl": (lambda **o: alexnet_small(5, n=128, expand="cl", rate=2, **o), 63, (2, 5)),
    "mobilenet_v1": (lambda **o: mobilenet_v1(5, width=0.25, expand="cl", rate=2, **o), 33, (2, 5)),
    "mobilenet_v2": (lambda **o: mobilenet_v2(5, width=0.25, expand="cl", rate=2, **o), 33, (2, 5)),
    "shufflenet_v2_x0_5": (lambda **o: shufflenet_v2_x0_5(5, expand="cl", rate=2, **o), 33, (2, 5)),
    "unet_small": (lambda **o: unet_small(5, widths=(4, 8), expand="cl", **o), 13, (2, 5, 13, 13)),
    "yolo_lite": (lambda **o: yolo_lite(30, expand="cl", rate=2, **o), 65, (2, 30, 2, 2)),
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(make, **options):
    with torch.device("meta"):
        return make(**options)


def small(name, **options):
    make, side, shape = SMALL[name]
    model = randomise_norms(make(**options)).double().eval()
    return model, torch.randn(2, 3, side, side, dtype=torch.float64), shape


@pytest.mark.parametrize(
    ("make", "millions", "mega_macs"),
    # Parameters for 1000 classes and multiply-adds at 224 x 224: MobileNetV1 as its paper has them
    # (4.2 M, 569), V2 and ShuffleNetV2 as torchvision's documentation does (0.30 and 0.04 giga).
    [
        (mobilenet_v1, 4.23, 569),
        (mobilenet_v2, 3.50, 301),
        (shufflenet_v2_x0_5, 1.37, 40),
    ],
)
def test_standard_parameters(make, millions, mega_macs):
    model = on_meta(make)
    assert round(count(model) / 1e6, 2) == millions
    cost = model.costs((224, 224))
    assert (cost.params, round(cost.macs / 1e6)) == (count(model), mega_macs)


@pytest.mark.parametrize("n", [128, 256, 512])
def test_alexnet_has_the_widths_of_the_talk(n):
    model = on_meta(alexnet_small, n=n, expand="ck")
    assert [conv.out_channels for conv in model.convs] == [64, 192, 384, n, n]
    first, second, *others = model.convs
    assert [m.in_channels for m in first.members] + [64] == [3, 6, 128, 128, 128, 64]
    assert [m.kernel_size for m in first.members] == [(3, 3)] * 5
    assert first.members[-1].stride == (4, 4)
    assert [m.out_channels for m in second.members] == [128, 192]
    assert all(type(conv) is nn.Conv2d for conv in others)


def plan_of(make):
    model = on_meta(make, expand="cl")
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpandedConv2d)}


def test_mobilenet_v1_expands_its_stem_and_every_depthwise_convolution():
    chains = plan_of(mobilenet_v1)
    assert list(chains) == ["stem", *(f"blocks.{n}.depthwise" for n in range(13))]
    assert chains["stem"].widths == (12, 128)
    assert chains["blocks.12.depthwise"].widths == (4096, 4096)
    assert chains["blocks.12.depthwise"].groups == 1024


def test_mobilenet_v2_expands_its_stem_and_where_it_strides():
    chains = plan_of(mobilenet_v2)
    assert [name.split(".")[1] for name in chains] == ["0", "2", "4", "7", "14"]
    assert all(chain.stride == (2, 2) for chain in chains.values())
    assert [chain.groups for chain in chains.values()] == [1, 96, 144, 192, 576]


def test_shufflenet_expands_its_stem_and_every_depthwise_convolution():
    chains = plan_of(shufflenet_v2_x0_5)
    # Sixteen units, three of which have two branches.
    assert len(chains) == 1 + 16 + 3
    assert all(chain.groups == chain.in_channels for n, chain in chains.items() if n != "conv1.0")
    model = on_meta(shufflenet_v2_x0_5)
    assert Counter(c.groups > 1 for c in model.modules() if isinstance(c, nn.Conv2d))[True] == 19


@pytest.mark.parametrize("make", [unet_small, yolo_lite])
def test_our_plans_expand_every_3_x_3_convolution(make):
    plain = {
        n: m
        for n, m in on_meta(make).named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert list(plan_of(make)) == list(plain)
    assert len(plain) == (14 if make is unet_small else 6)


@pytest.mark.parametrize(
    ("make", "theirs"),
    [(mobilenet_v2, "mobilenet_v2"), (shufflenet_v2_x0_5, "shufflenet_v2_x0_5")],
)
def test_takes_torchvisions_state_dict(make, theirs):
    if not torchvision_loads():
        pytest.skip("needs torchvision")
    public = getattr(importlib.import_module("torchvision.models"), theirs)(num_classes=5)
    public, model = randomise_norms(public).eval(), make(5).eval()
    model.load_state_dict(public.state_dict())
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(model(x), public(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_contracts_to_the_plain_network(name):
    model, x, shape = small(name, form="expanded")
    expected = model(x)  # with gradients, so by the members
    assert expected.shape == shape
    plain = contract(model)
    assert not any(isinstance(layer, ExpandedConv2d) for layer in plain.modules())
    twin = build(plain.config).double().eval()
    twin.load_state_dict(plain.state_dict())
    torch.testing.assert_close(twin(x), expected, rtol=1e-9, atol=1e-9)
    assert count(plain) < count(model)
    assert model.costs(x.shape[2:]) == twin.costs(x.shape[2:])


@pytest.mark.parametrize("name", SMALL)
def test_is_rebuilt_from_its_configuration_and_from_a_file(name, tmp_path):
    model, x, _ = small(name)
    model, x = model.float(), x.float()
    assert build(json.loads(json.dumps(model.config))).config == model.config
    pyeff.save(model, tmp_path / "model.safetensors")
    loaded = pyeff.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    model, x, _ = small(name)
    model.train()(x).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_unet_cuts_off_what_it_added():
    model = unet_small(3, widths=(4, 8, 16)).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 15, 18)
        whole = model(torch.nn.functional.pad(x, (0, 2, 0, 1)))
        torch.testing.assert_close(model(x), whole[:, :, :15, :18])


OPTIONS = [
    *((make, {"rate": 0, "expand": "cl"}, "rate must be positive, got 0") for make in MAKERS),
    *((make, {"expand": "fc"}, r"expand must be one of None, .* got 'fc'") for make in MAKERS),
    *((make, {"in_channels": 0}, "must be positive") for make in MAKERS),
    (alexnet_small, {"n": 100}, "alexnet_small: n must be 128, 256 or 512, got 100"),
    (mobilenet_v1, {"width": 0.0}, "mobilenet_v1: classes, in_channels and width must be positive"),
    (mobilenet_v2, {"width": 0.0}, "mobilenet_v2: classes, in_channels and width must be positive"),
    (unet_small, {"widths": (8,)}, "at least 2 widths must be positive, got 20, 3 and"),
]


@pytest.mark.parametrize(("make", "options", "message"), OPTIONS)
def test_options_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        on_meta(make, **options)
    assert str(caught.value).startswith(f"{make.__name__}: ")


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match=r"AlexNetSmall: x must be .* at least 63 rows and"):
        alexnet_small(5, n=128)(torch.randn(1, 3, 62, 70))
    with pytest.raises(ValueError, match=r"YoloLite: x must be .* at least 32 rows and columns"):
        yolo_lite()(torch.randn(1, 3, 31, 64))


def test_a_layer_with_two_names_runs_contracted_in_both():
    layer = ExpandedConv2d(3, 3, 3, padding=1)
    runs = as_it_runs(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(runs[0]) is nn.Conv2d
    assert runs[2] is runs[0]


def test_a_rate_may_leave_one_channel():
    net = build({"family": "smallnet", "kernel": 3, "expand": "cl", "rate": 0.05, "classes": 5})
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 5)
