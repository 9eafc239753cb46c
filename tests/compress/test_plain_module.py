"""A compressed network as a module of torch's own operators."""

import io
import subprocess
import sys

import pytest
import torch
from compress.zeroing import kill, randomise_norms
from torch import nn

from pyeff.compress import factorize, plain_module, shrink
from pyeff.models import dec3
from pyeff.nn import NestedConv2d

LOADED = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert "pyeff" not in sys.modules
torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])
"""


def compressed():
    torch.manual_seed(0)
    model = dec3(12, 5, 3)
    randomise_norms(model)
    x = torch.randn(1, 3, 16, 16)
    kill(model, x)
    return factorize(shrink(model.eval(), x), energy=0.7, layers=["layers.1.second"], example=x)


def test_another_process_runs_it_without_pyeff(tmp_path):
    model, x = compressed(), torch.randn(3, 3, 16, 16)
    plain = plain_module(model, x[:1])
    assert {name for name, _ in plain.named_parameters()} == {
        n for n, _ in model.named_parameters()
    }
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    torch.export.save(torch.export.export(plain, (x,)), tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    words = [
        sys.executable,
        "-c",
        LOADED,
        *(str(tmp_path / n) for n in ("net.pt2", "x.pt", "y.pt")),
    ]
    subprocess.run(words, check=True, timeout=200)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_is():
    model = compressed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = plain_module(model, torch.randn(1, 3, 16, 16))
    assert model.training
    with torch.no_grad():
        next(plain.parameters()).zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    torch.save(plain.state_dict(), io.BytesIO())


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if bool(x.sum() > 0) else x


def test_what_cannot_be_plain_is_told():
    with pytest.raises(ValueError, match=r"plain_module: model must be one that torch.export take"):
        plain_module(Branching(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"made of torch's operators, got pyeff::nested_conv2d"):
        plain_module(NestedConv2d(4, 4, 3), torch.randn(2, 4, 5, 5))
