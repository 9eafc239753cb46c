"""Costs of levels, and the level for a budget."""

from dataclasses import replace

import pytest
import torch

from pyeff.measure import LevelCost
from pyeff.models import budget, dvn, nestednet


@pytest.fixture(scope="module")
def model():
    return dvn("resnet8", {"a": 5, "b": 9}, 3, widths=[6, 12, 24], in_channels=1).eval()


def test_costs_are_those_of_the_materialised_network(model):
    for cost in model.costs("b", 8):
        plain = model.materialise("b", cost.level)
        assert cost.params == sum(p.numel() for p in plain.parameters())
        tensors = [*plain.parameters(), *plain.buffers()]
        assert cost.weight_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_costs_rise_with_level_and_size(model):
    small, large = model.costs("a", 8), model.costs("a", (16, 8))
    assert [cost.level for cost in small] == [1, 2, 3]
    for measure in ("params", "conv_fc_params", "macs", "weight_bytes", "peak_bytes"):
        values = [getattr(cost, measure) for cost in small]
        assert values == sorted(set(values)), measure
    assert [c.macs for c in large] > [c.macs for c in small]
    assert [c.params for c in large] == [c.params for c in small]
    assert all(cost.latency_s is None for cost in small)
    assert model.costs("a") == model.costs("a", 32)


def test_latency_is_measured_when_asked_for(model):
    assert all(cost.latency_s > 0 for cost in model.costs("a", 8, latency=True))


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_params", lambda cost: cost.params),
        ("max_macs", lambda cost: cost.macs),
        ("max_memory", lambda cost: cost.weight_bytes + cost.peak_bytes),
    ],
)
def test_pick_takes_the_largest_level_that_fits(model, limit, value):
    costs = model.costs("a", 8)
    for cost in costs:
        assert model.pick("a", input_size=8, **{limit: value(cost)}) == cost.level
        assert model.pick("a", input_size=8, **{limit: value(cost) + 1}) == cost.level
        if cost.level > 1:
            assert model.pick("a", input_size=8, **{limit: value(cost) - 1}) == cost.level - 1
    smallest = value(costs[0])
    message = rf"smallest level's cost \({smallest:g} for {limit}\), got {limit}={smallest - 1:g}"
    with pytest.raises(ValueError, match=message):
        model.pick("a", input_size=8, **{limit: smallest - 1})


def test_pick_by_latency(model, monkeypatch):
    real = budget.level_costs

    def measured(model, task, size, latency):
        assert latency
        costs = real(model, task, size, False)
        return [replace(cost, latency_s=0.001 * cost.level) for cost in costs]

    monkeypatch.setattr(budget, "level_costs", measured)
    assert model.pick("a", input_size=8, max_latency=0.0025) == 2
    with pytest.raises(ValueError, match=r"\(0.001 for max_latency\), got max_latency=0.0005"):
        model.pick("a", input_size=8, max_latency=0.0005)


def test_all_budgets_must_hold(model):
    costs = model.costs("a", 8)
    both = {"max_params": costs[2].params, "max_macs": costs[0].macs}
    assert model.pick("a", input_size=8, **both) == 1


def test_without_a_budget_there_is_nothing_to_pick(model):
    with pytest.raises(ValueError, match=r"one of max_params, .* must be given, got none"):
        model.pick("a")


def test_bad_input_size(model):
    with pytest.raises(ValueError, match="input_size must be positive, got 0"):
        model.costs("a", 0)


def test_masked_weights_are_not_counted():
    model = nestednet("resnet8", 5, 2, "weight", widths=[8, 16, 32], densities=[0.25, 1.0])
    model.step(1.0)
    small, full = model.costs(input_size=8)
    blocks = sum(
        getattr(block, name).weight.numel() for block in model.blocks for name in block.conv_grids
    )
    assert full.conv_fc_params - small.conv_fc_params == blocks - blocks // 4
    plain = model.materialise(level=1)
    assert small.conv_fc_params == sum(
        int((p != 0).sum()) for p in plain.parameters() if p.dim() > 1
    )
    assert isinstance(small, LevelCost)


def test_costs_leave_no_trace(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.costs("a", 8, latency=True)
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
