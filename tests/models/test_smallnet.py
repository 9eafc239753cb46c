import json

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import images, randomise_norms
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.convert import contract
from pyeff.models import build, smallnet
from pyeff.nn import ExpandedConv2d, ExpandedLinear

PLANS = ("fc", "cl", "ck", "cl+fc", "ck+fc")


def count(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(**options):
    with torch.device("meta"):
        return smallnet(**options)


@pytest.mark.parametrize(("kernel", "thousands", "millions"), [(3, 15.05, 0.47), (7, 66.19, 4.45)])
def test_parameters_and_multiply_adds_of_the_plain_network(kernel, thousands, millions):
    model = on_meta(kernel=kernel)
    assert round(count(model) / 1e3, 2) == thousands
    cost = model.costs()
    assert (cost.params, round(cost.macs / 1e6, 2)) == (count(model), millions)


@pytest.mark.parametrize(
    ("plan", "thousands"),
    # The last three are printed in millions, with two digits.
    [("cl", 547.1), ("ck", 187.0), ("cl+fc", 2110), ("ck+fc", 1750), ("fc", 1620)],
)
def test_parameters_of_the_expanded_network(plan, thousands):
    digits = 1 if thousands < 1000 else -1
    assert round(count(on_meta(expand=plan)) / 1e3, digits) == thousands


@pytest.mark.parametrize(("plan", "millions"), [("cl", 57.4), ("ck", 23.8)])
def test_multiply_adds_of_the_chains(plan, millions):
    model, x = on_meta(expand=plan, form="expanded"), torch.empty(1, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    assert round(counter.get_total_flops() / 2e6, 1) == millions


def test_widths_are_those_of_the_released_code():
    model = on_meta(expand="ck+fc")
    widths = [getattr(model, name).widths for name in ("conv1", "conv2", "conv3", "fc1")]
    assert widths == [(3, 32), (32, 64), (64, 128), (2048, 256)]
    assert [getattr(on_meta(expand="cl"), f"conv{n}").widths for n in (1, 2, 3)] == widths[:3]
    assert on_meta(expand="ck", rate=2).conv3.widths == (32, 64)


@pytest.mark.parametrize("plan", PLANS)
def test_which_layers_are_expanded(plan):
    model = on_meta(expand=plan)
    chains = {n: m for n, m in model.named_modules() if isinstance(m, ExpandedConv2d)}
    assert list(chains) == ([] if plan == "fc" else ["conv1", "conv2", "conv3"])
    assert all(plan.startswith(chain.mode) for chain in chains.values())
    assert isinstance(model.fc1, ExpandedLinear) == ("fc" in plan)
    assert isinstance(model.fc2, nn.Linear)


@pytest.mark.parametrize("kernel", [3, 7])
def test_is_what_the_table_says(kernel):
    model = randomise_norms(smallnet(5, kernel=kernel)).double().eval()
    x = images(2, 32)
    y = x
    for number in (1, 2, 3):
        conv, norm = getattr(model, f"conv{number}"), getattr(model, f"norm{number}")
        y = F.conv2d(y, conv.weight, conv.bias, padding=0 if kernel == 3 else 3)
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[:, None, None]
        y = F.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])
        y = F.max_pool2d(y, 2)
    y = F.relu(y.reshape(2, -1) @ model.fc1.weight.T + model.fc1.bias)
    expected = y @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS)
def test_contracts_to_the_plain_network(plan):
    model = randomise_norms(smallnet(5, expand=plan, form="expanded")).double().eval()
    x = images(2, 32)
    plain = smallnet(5).double().eval()
    small = contract(model)
    assert {**small.config, "form": "auto"} == plain.config
    plain.load_state_dict(small.state_dict())
    expected = model(x)  # with gradients, so by the members
    torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert model.costs() == plain.costs()


@pytest.mark.parametrize("plan", [None, "ck+fc", "cl"])
def test_is_rebuilt_from_its_configuration_and_from_a_file(plan, tmp_path):
    model = smallnet(5, expand=plan, rate=2, image_size=24).eval()
    twin = build(json.loads(json.dumps(model.config))).eval()
    assert twin.config == model.config
    pyeff.save(model, tmp_path / "model.safetensors")
    loaded = pyeff.load(tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    pyeff.save(contract(model), tmp_path / "small.safetensors")
    small = pyeff.load(tmp_path / "small.safetensors")
    assert type(small.conv1) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


def test_the_non_linear_network_starts_the_linear_one():
    relu, linear = smallnet(expand="ck", activation="relu"), smallnet(expand="ck")
    linear.load_state_dict(relu.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(relu.eval()(x), linear.eval()(x))
    # Its cost at run time is that of the chains: no plain layer computes the same.
    assert relu.costs().params == count(relu) == 186_982
    assert round(relu.costs().macs / 1e6, 1) == 23.8
    with pytest.raises(ValueError, match="layer 'conv1' must equal a plain one"):
        contract(relu)


def test_every_parameter_gets_a_gradient():
    for form in ("expanded", "contracted"):
        model = smallnet(expand="ck+fc", form=form, image_size=16)
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # A bias before a batch norm in training moves nothing but rounding errors.
        assert not [n for n in missing if not n.endswith("bias")]


def test_other_sizes_and_channels():
    assert smallnet(4, in_channels=1, image_size=8, expand="ck").conv1.widths == (1, 32)
    assert smallnet(4, in_channels=1, image_size=8)(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    with torch.no_grad():
        assert smallnet().eval()(torch.randn(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smallnet(kernel=5), "smallnet: kernel must be 3 or 7, got 5"),
        (
            lambda: smallnet(kernel=3, expand="ck"),
            r"smallnet: expand must be one of None, 'fc', 'cl', 'cl\+fc', got 'ck'",
        ),
        (lambda: smallnet(expand="all"), "smallnet: expand must be one of None, 'fc', 'cl', 'ck'"),
        (lambda: smallnet(0), "smallnet: classes, in_channels and image_size must be positive"),
        (lambda: smallnet(kernel=3, image_size=8), "image_size must leave a pixel after three"),
        (lambda: smallnet(expand="ck", rate=0), "smallnet: rate must be positive, got 0"),
        (lambda: smallnet(expand="ck", form="fast"), "smallnet: form must be one of auto, "),
        (
            lambda: smallnet(expand="ck", activation="tanh"),
            "smallnet: activation must be None or 'relu', got 'tanh'",
        ),
        (
            lambda: smallnet(activation="relu"),
            "smallnet: activation must be None without expand, got 'relu'",
        ),
        (
            lambda: smallnet()(torch.randn(2, 1, 32, 32)),
            r"SmallNet: x must be \[N, 3, H, W\] with at least 1 rows and columns, got",
        ),
        (
            lambda: smallnet()(torch.randn(2, 3, 24, 24)),
            r"SmallNet: x must have 32 rows and columns, got \[2, 3, 24, 24\]",
        ),
        (
            lambda: smallnet()(torch.randn(0, 3, 32, 32)),
            "SmallNet: x must hold an image in training, got none",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
