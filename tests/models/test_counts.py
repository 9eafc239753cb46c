"""Weights and multiply-adds against table 1.8 of the digest (100 classes, 3x3 stem, conv + FC)."""

import pytest
import torch

from pyeff.measure import measure_cost
from pyeff.models import build_backbone, dvn

FULL = {  # params M, MACs M
    "wrn32_4": (7.37, 1067),
    "resnet56": (0.855, 125.5),
    "resnet42": (29.84, 1455),
}
LEVELS = [  # backbone, k, level, mode, params M, MACs M
    ("wrn32_4", 3, 1, "full", 0.82, 118),
    ("wrn32_4", 3, 1, "inner", 2.47, 355),
    ("wrn32_4", 3, 2, "full", 3.29, 476),
    ("wrn32_4", 3, 2, "inner", 4.93, 713),
    ("wrn32_4", 4, 1, "full", 0.47, 67),
    ("wrn32_4", 4, 1, "inner", 1.86, 267),
    ("wrn32_4", 4, 2, "full", 1.85, 267),
    ("wrn32_4", 4, 2, "inner", 3.70, 534),
    ("wrn32_4", 4, 3, "full", 4.15, 600),
    ("wrn32_4", 4, 3, "inner", 5.53, 800),
    ("resnet56", 2, 1, "full", 0.22, 31),
    ("resnet56", 2, 1, "inner", 0.43, 63),
    ("resnet56", 4, 1, "full", 0.05, None),
    ("resnet56", 4, 2, "full", 0.22, None),
    ("resnet56", 4, 3, "full", 0.48, None),
    ("resnet56", 4, 1, "inner", 0.22, None),
    ("resnet56", 4, 2, "inner", 0.43, None),
    ("resnet56", 4, 3, "inner", 0.64, None),
    ("resnet42", 3, 1, "full", 3.33, 161),
    ("resnet42", 3, 1, "inner", 9.99, 485),
    ("resnet42", 3, 2, "full", 13.26, 649),
    ("resnet42", 3, 2, "inner", 19.90, 972),
]


def _agrees(value, printed):
    """Whether a count is what the table prints, up to its last digit."""
    digits = len(str(printed).split(".")[1]) if isinstance(printed, float) else 0
    return abs(value / 1e6 - printed) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("name", FULL)
def test_plain_backbone(name):
    with torch.device("meta"):
        cost = measure_cost(build_backbone(name, 100).eval(), (3, 32, 32))
    params, macs = FULL[name]
    assert _agrees(cost.conv_fc_params, params)
    assert _agrees(cost.macs, macs)


@pytest.mark.parametrize(("name", "k", "mode"), sorted({(n, k, m) for n, k, _, m, _, _ in LEVELS}))
def test_levels(name, k, mode):
    with torch.device("meta"):
        costs = dvn(name, {"cifar100": 100}, k, mode).costs()
    for _, _, level, _, params, macs in [
        row for row in LEVELS if row[:2] + row[3:4] == (name, k, mode)
    ]:
        cost = costs[level - 1]
        assert cost.level == level
        assert _agrees(cost.conv_fc_params, params), (cost, params)
        assert macs is None or _agrees(cost.macs, macs), (cost, macs)
    assert _agrees(costs[-1].conv_fc_params, FULL[name][0])
    assert _agrees(costs[-1].macs, FULL[name][1])


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"),
    # torchvision's resnet18/34/50: parameters and multiply-adds as its documentation states them.
    [("resnet18", 11.69, 1.81), ("resnet34", 21.80, 3.66), ("resnet50", 25.56, 4.09)],
)
def test_imagenet_backbones(name, millions, giga_macs):
    with torch.device("meta"):
        cost = measure_cost(build_backbone(name, 1000).eval(), (3, 224, 224))
    assert round(cost.params / 1e6, 2) == millions
    assert round(cost.macs / 1e9, 2) == giga_macs


@pytest.mark.parametrize(
    ("name", "millions"),
    # He et al. 2016 (CIFAR, 10 classes) and Zagoruyko, Komodakis 2016 as they print them.
    [("resnet20", 0.27), ("resnet56", 0.85), ("resnet110", 1.7), ("wrn28_10", 36.5)],
)
def test_cifar_backbones(name, millions):
    with torch.device("meta"):
        cost = measure_cost(build_backbone(name, 10).eval(), (3, 32, 32))
    digits = len(str(millions).split(".")[1])
    assert round(cost.params / 1e6, digits) == millions
