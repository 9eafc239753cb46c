"""Counting multiply-adds, parameters, bytes; measuring seconds."""

import time

import pytest
import torch
from torch import nn

from pyeff.measure import layer_costs, measure_cost, measure_latency, peak_activation_bytes
from pyeff.nn import (
    Downsampler,
    ExpandedConv2d,
    ExpandedLinear,
    FactorizedConv2d,
    RepVGGBlock,
    Upsampler,
)


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def test_counts_by_hand():
    net = _net().to("meta")
    layers, _ = layer_costs(net, (3, 10, 6))
    assert [(layer.name, layer.weights, layer.macs) for layer in layers] == [
        ("0", 216, 216 * 5 * 3),
        ("3", 12 * 2 * 9, 12 * 2 * 9 * 5 * 3),
        ("6", 60, 60),
    ]
    cost = measure_cost(net, (3, 10, 6), level=2)
    assert cost.level == 2
    assert cost.conv_fc_params == 216 + 216 + 60
    assert cost.params == cost.conv_fc_params + 16 + 12 + 5
    assert cost.macs == 432 * 15 + 60
    assert cost.weight_bytes == 4 * (cost.params + 16) + 8  # running statistics, batch counter
    assert cost.latency_s is None
    assert cost.memory_bytes == cost.weight_bytes + cost.peak_bytes


def test_pairs_and_what_folds_its_norm():
    """Both members of a pair, the first at the size between; a layer's own convolution once."""
    net = nn.Sequential(
        Downsampler(3, 8),  # 5 x 3
        FactorizedConv2d(8, 12, 3, 2, 1, rank=4, norm="both"),  # 3 x 2, by way of 3 x 3
        FactorizedConv2d(12, 6, 3, 2, 1, order="horizontal_first"),  # 2 x 1, by way of 3 x 1
        Upsampler(6, 2),  # 4 x 2
        nn.ConvTranspose2d(2, 4, 2, 2, groups=2),
    )
    layers, peak = layer_costs(net.eval().to("meta"), (3, 10, 6))
    assert [(layer.name, layer.macs) for layer in layers] == [
        ("0.conv", 5 * 3 * 9 * 3 * 5),
        ("1.first", 3 * 8 * 4 * 3 * 3),
        ("1.second", 3 * 4 * 12 * 3 * 2),
        ("2.first", 3 * 12 * 6 * 3 * 1),
        ("2.second", 3 * 6 * 6 * 2 * 1),
        ("3.conv", 9 * 6 * 2 * 2 * 1),
        ("4", 4 * 2 * 2 * 4 * 2),
    ]
    # Weights with a norm folded in are no activation: here the first layer's maps are the most.
    assert peak == layer_costs(net, (3, 10, 6))[1]
    assert peak < 4 * (3 * 60 + 3 * 8 * 15 + 3 * 15)


def test_masked_weights_count_nowhere():
    net = _net().to("meta")
    full, part = measure_cost(net, (3, 10, 6)), measure_cost(net, (3, 10, 6), kept={"0": 54})
    assert full.conv_fc_params - part.conv_fc_params == 162
    assert full.params - part.params == 162
    assert full.macs - part.macs == 162 * 15
    assert full.weight_bytes - part.weight_bytes == 162 * 4
    assert full.peak_bytes == part.peak_bytes


def test_peak_counts_what_is_alive_at_once():
    class Residual(nn.Module):
        def forward(self, x):
            y = x.repeat(1, 2, 1, 1)  # 4x and 8x alive
            y = y * 2  # x, y, new y: 4 + 8 + 8 floats each
            y = torch.relu_(y)  # in place
            return y.sum(1) + x.sum(1)

    x = torch.empty(1, 4, 5, 5, device="meta")
    assert peak_activation_bytes(Residual(), x) == (4 + 8 + 8) * 25 * 4
    assert peak_activation_bytes(nn.Identity(), x) == 4 * 25 * 4


def test_peak_does_not_count_weights():
    conv = nn.Conv2d(4, 6, 1).to("meta")
    x = torch.empty(1, 4, 5, 5, device="meta")
    assert peak_activation_bytes(conv, x) == (4 + 6) * 25 * 4


@pytest.mark.parametrize(
    ("make", "image", "weights", "positions"),
    [
        (lambda **o: ExpandedConv2d(4, 6, 5, 2, 2, groups=2, **o), (4, 9, 9), 6 * 2 * 25, 25),
        (lambda **o: ExpandedLinear(4, 6, **o), (4,), 24, 1),
        (lambda **o: RepVGGBlock(4, 6, 3, padding=1, **o), (4, 7, 7), 6 * 4 * 9, 49),
    ],
)
def test_an_expanded_layer_costs_what_it_runs_as(make, image, weights, positions):
    with torch.device("meta"):
        layer = make().eval()
    ((found,), _) = layer_costs(layer, image)
    assert (found.weights, found.macs) == (weights, weights * positions)


def test_a_chain_with_activations_costs_its_members():
    with torch.device("meta"):
        layer = ExpandedConv2d(2, 3, 3, activation="relu", widths=(4, 5)).eval()
    found, _ = layer_costs(layer, (2, 6, 6))
    assert [cost.macs for cost in found] == [8 * 36, 180 * 16, 15 * 16]


def test_latency_is_the_interleaved_median():
    calls = []

    def model(name, seconds):
        def run(x):
            calls.append(name)
            time.sleep(seconds)
            return x

        return run

    x = torch.zeros(1)
    slow, fast = measure_latency([model("a", 0.05), model("b", 0.001)], x, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert slow > 0.04
    assert slow > fast > 0.0009


def test_errors():
    with pytest.raises(ValueError, match="repeats must be at least 1 and warmup at least 0, got 0"):
        measure_latency([], torch.zeros(1), repeats=0)
    with pytest.raises(ValueError, match="model must be in eval mode and on the meta device"):
        measure_cost(_net(), (3, 8, 8))
    with pytest.raises(ValueError, match="model must be in eval mode and on the meta device"):
        measure_cost(_net().to("meta").train(), (3, 8, 8))
