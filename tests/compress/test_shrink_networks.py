"""pyeff's own networks: channels zeroed by hand go; the rest is saved, trained and exported."""

import copy

import pytest
import torch
from compress.zeroing import (
    assert_exports,
    assert_lost,
    assert_trains,
    kill,
    parameters,
    randomise_norms,
)

import pyeff
from pyeff.compress.shrink import shrink, shrink_with_report
from pyeff.models import build_backbone, dec3, decomposeme, erfnet, resnet50_decomposed

WIDTHS = (8, 12, 16, 24, 16, 16, 24, 24)
WIDE = (8, 16, 24)
NETWORKS = {
    "resnet with padded shortcuts": (lambda: build_backbone("resnet14", 5, widths=(8, 16, 32)), 16),
    "resnet with projections": (
        lambda: build_backbone("resnet18", 5, widths=(8, 12, 16, 20), depths=(1, 1, 1, 1)),
        32,
    ),
    "wide resnet": (
        lambda: build_backbone("wrn28_10", 5, widths=(8, 16, 24), depths=(1, 2, 1)),
        16,
    ),
    "erfnet": (lambda: erfnet(4, widths=WIDE), 32),
    "erfnet's encoder of dense blocks": (lambda: erfnet(4, True, widths=WIDE, dense=True), 32),
    "decomposeme": (lambda: decomposeme(5, WIDTHS, pools=(2, 4)), 16),
    "decomposeme with shortcuts": (lambda: decomposeme(5, WIDTHS, skip=True, pools=(2, 4)), 16),
    "decomposeme of dense layers": (lambda: decomposeme(5, WIDTHS, dense=True, pools=(2, 4)), 16),
    "dec3": (lambda: dec3(12, 5, 3), 24),
    "dec3 without norms": (lambda: dec3(12, 5, 3, norm=None), 24),
    "resnet50_decomposed": (
        lambda: resnet50_decomposed(5, widths=(16, 24, 32, 40), depths=(1, 1, 1, 1)),
        32,
    ),
}

# Tracing takes seconds; these have every layer there is.
EXPORTED = ("resnet with padded shortcuts", "erfnet", "decomposeme", "resnet50_decomposed")


def built(name):
    make, size = NETWORKS[name]
    model = make()
    randomise_norms(model)
    return model.eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_zeroed_channels_are_removed(name, tmp_path):
    model, x = built(name)
    lost = kill(model, x)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(x)
    small, report = shrink_with_report(model, x)
    with torch.no_grad():
        torch.testing.assert_close(
            small(x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
    assert report.difference < 1e-5
    assert_lost(model, small, report, lost)
    assert parameters(small) < 0.8 * parameters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_trains(small, x)
    if name in EXPORTED:
        assert_exports(small, x)
    pyeff.save(small, tmp_path / "small.safetensors")
    again = pyeff.load(tmp_path / "small.safetensors")
    assert again.config == small.config
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))


@pytest.mark.parametrize("name", ["decomposeme", "resnet with projections"])
def test_a_shrunk_network_is_shrunk_again(name):
    model, x = built(name)
    kill(model, x, share=0.3)
    once = shrink(model, x)
    kill(once, x, share=0.3)
    twice = shrink(once, x)
    with torch.no_grad():
        wanted = once(x)
        torch.testing.assert_close(
            twice(x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
    assert parameters(twice) < parameters(once) < parameters(model)
    assert twice.config["base"] == model.config
    again = pyeff.models.build(twice.config)
    assert [p.shape for p in again.parameters()] == [p.shape for p in twice.parameters()]


@pytest.mark.parametrize("name", ["erfnet", "decomposeme", "dec3"])
def test_a_shrunk_network_tells_what_it_costs(name):
    model, x = built(name)
    size = tuple(x.shape[2:])
    kill(model, x)
    small = shrink(model, x)
    assert small.costs(size).params == parameters(small) < model.costs(size).params
    assert small.costs(size).macs < model.costs(size).macs


def test_a_network_in_training_learns_on():
    """A step of the small network changes every parameter, norms' statistics included."""
    model, x = built("erfnet")
    kill(model, x)
    small = shrink(model, x).train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(x).square().mean().backward()
    optimizer.step()
    moved = [
        name for name, value in small.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(moved) > 0.9 * len(before)
