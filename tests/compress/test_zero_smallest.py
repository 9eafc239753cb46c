"""Magnitude pruning of whole channels, after the training."""

import copy

import pytest
import torch
from compress.zeroing import parameters
from torch import nn

from pyeff.compress import channel_groups, shrink, zero_smallest


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
        nn.Conv2d(24, 4, 3),
    ).eval()


X = (1, 3, 12, 12)


def test_the_smallest_go_and_the_others_keep_their_weights():
    model, x = network(), torch.randn(X)
    with torch.no_grad():
        model[3].weight[:10] *= 0.01
    before = copy.deepcopy(model)
    left = zero_smallest(model, x, target_params=0.6, include_norm=True)
    zero = (model[3].weight == 0).flatten(1).all(1)
    assert zero[:10].all()
    assert left["3"] == (24, 24 - int(zero.sum()))
    assert torch.equal(model[3].weight[~zero], before[3].weight[~zero])
    assert torch.equal(model[4].weight == 0, zero)
    small = shrink(model, x)
    assert 0.5 * parameters(model) < parameters(small) <= 0.6 * parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


def test_every_group_keeps_the_same_share_of_its_longest():
    model, x = network(), torch.randn(X)
    lengths = {g.name: g.gather(model).norm(dim=1) for g in channel_groups(model, x)}
    assert zero_smallest(model, x, share=0.45) == {"0": (24, 11), "3": (24, 11)}
    for group in channel_groups(model, x):
        kept = lengths[group.name].topk(11).indices
        alive = ~group.dead(model)
        assert torch.equal(alive.nonzero().flatten(), kept.sort().values)


def test_floors_hold():
    assert zero_smallest(network(), torch.randn(X), share=0.01) == {"0": (24, 8), "3": (24, 8)}
    model = network()
    assert zero_smallest(model, torch.randn(X), share=0.01, floor=3)["0"] == (24, 3)
    assert zero_smallest(network(), torch.randn(X), share=1) == {"0": (24, 24), "3": (24, 24)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "share or target_params must be given, got neither"),
        ({"share": 0.5, "target_params": 0.5}, "must be given, got share and target_params"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"target_params": 1.5}, r"target_params must be in \(0, 1\], got 1.5"),
        ({"share": 0.5, "floor": 0}, "floor must be at least 1, got 0"),
        ({"target_params": 0.01}, "target_params must be at least 0.1"),
    ],
)
def test_bad_input_is_told_and_changes_nothing(options, message):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        zero_smallest(model, torch.randn(X), **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_network_without_channels_to_remove():
    with pytest.raises(ValueError, match="model must have channels that can be removed, got none"):
        zero_smallest(nn.Linear(3, 2), torch.randn(1, 3), share=0.5)
