"""Networks that others wrote: channels zeroed by hand are removed, and everything else goes on."""

import copy
import importlib.util

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
from compress.zoo import TIMM, TORCHVISION

from pyeff.compress.saved import load, save
from pyeff.compress.shrink import shrink_with_report

ZOO = {**TORCHVISION, **TIMM}


def built(name):
    """The network with norms that were trained, so to speak, and an image for it."""
    for package in ("torchvision", "timm") if name in TIMM else ("torchvision",):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install pyeff[vision]")
    make, size = ZOO[name]
    model = make()
    randomise_norms(model)
    return model.eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", ZOO)
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
    assert report.cut_difference <= report.tolerance
    assert_lost(model, small, report, lost)
    assert parameters(small) < 0.9 * parameters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_trains(small, x)
    assert_exports(small, x)
    save(small, tmp_path / "small.safetensors")
    with torch.no_grad():
        again = load(tmp_path / "small.safetensors", base=model)
        torch.testing.assert_close(again(x), small(x))
