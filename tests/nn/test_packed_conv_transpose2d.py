"""The packed transposed convolution: PyTorch's layer, on the CPU kernels in inference."""

import copy

import pytest
import torch
from torch import fx, nn

import pyeff
from pyeff.nn.packed_conv_transpose2d import PackedConvTranspose2d
from pyeff.ops import _sampler_conv2d as samplers

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ARGUMENTS = {
    "erfnet's last": (16, 20, 2, 2),
    "odd": (5, 7, 3, 2, 1, 1),
    "without a bias": (6, 33, 4, 3, 1, 2, 1, False),
}


@pytest.fixture
def calls(monkeypatch):
    """The maps that the kernel was called for."""
    seen = []
    convolve = samplers.convolve
    monkeypatch.setattr(samplers, "convolve", lambda c, x: seen.append(x) or convolve(c, x))
    return seen


def plainly(layer, x):
    """PyTorch's layer, in float64."""
    plain = nn.ConvTranspose2d.forward
    return plain(copy.deepcopy(layer).double(), x.double())


def assert_near(y, expected):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=scale * TOLERANCE[y.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
@torch.no_grad()
def test_equals_torchs(name, dtype, calls):
    layer = PackedConvTranspose2d(*ARGUMENTS[name]).to(dtype)
    for n, size in ((1, (4, 6)), (2, (7, 9)), (0, (3, 3))):
        x = torch.randn(n, layer.in_channels, *size).to(dtype)
        y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, plainly(layer, x))
    assert len(calls) == 3


@pytest.mark.parametrize(("height", "width"), [(112, 120), (160, 321)])
@torch.no_grad()
def test_results_of_many_pages(height, width):
    """4.3 and 16.4 MB: from some of a huge page to several, none of them at its start."""
    layer = PackedConvTranspose2d(4, 20, 2, 2)
    x = torch.randn(1, 4, height, width)
    assert_near(layer(x), plainly(layer, x))


@torch.no_grad()
def test_changed_weights_are_seen(calls):
    layer = PackedConvTranspose2d(3, 4, 2, 2)
    x = torch.randn(1, 3, 5, 5)
    layer(x)
    layer.weight.mul_(2)
    assert_near(layer(x), plainly(layer, x))
    layer.load_state_dict(PackedConvTranspose2d(3, 4, 2, 2).state_dict())
    assert_near(layer(x), plainly(layer, x))
    layer.to(torch.float64)
    assert_near(layer(x.double()), plainly(layer, x))
    layer.bias = nn.Parameter(torch.randn(4).double())
    assert_near(layer(x.double()), plainly(layer, x))
    assert_near(copy.deepcopy(layer)(x.double()), plainly(layer, x))
    assert len(calls) == 6


def test_an_optimiser_step_is_seen(calls):
    layer = PackedConvTranspose2d(3, 4, 2, 2)
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        layer(x)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1, fused=True).step()
    with torch.no_grad():
        assert_near(layer(x), plainly(layer, x))
    assert len(calls) == 2


def test_gradients_compilers_and_tracers_see_torchs_layer(calls):
    layer = PackedConvTranspose2d(3, 4, 2, 2)
    x = torch.randn(1, 3, 5, 5)
    expected = nn.ConvTranspose2d.forward(layer, x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pyeff.backend("torch"):
            assert torch.equal(layer(x), expected)
        assert layer(x, output_size=[11, 11]).shape == (1, 4, 11, 11)
        traced = fx.symbolic_trace(nn.Sequential(layer))
        assert torch.equal(traced(x), expected)
    assert not calls


def test_its_state_is_that_of_torchs_layer():
    layer, plain = PackedConvTranspose2d(3, 4, 2, 2), nn.ConvTranspose2d(3, 4, 2, 2)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(layer, nn.ConvTranspose2d)


def test_what_does_not_fit_is_torchs_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="to have 3 channels"):
        PackedConvTranspose2d(3, 4, 2, 2)(torch.randn(1, 2, 5, 5))
