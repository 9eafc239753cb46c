"""ERFNet's layers against plain torch, written from the paper's description."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms
from torch import nn

from pyeff.nn import ConvNorm2d, Downsampler, NonBottleneck1d, Upsampler

LAYERS = {
    "block": lambda: NonBottleneck1d(4, 0.3, 2),
    "block horizontal": lambda: NonBottleneck1d(4, 0.3, 2, "horizontal_first", 5),
    "block dense": lambda: NonBottleneck1d(4, 0.3, 2, dense=True),
    "down": lambda: Downsampler(4, 7),
    "up": lambda: Upsampler(4, 3),
}


def made(name, train=False):
    return randomise_norms(LAYERS[name]().double()).train(train)


def norm(layer, y, train):
    return F.batch_norm(
        y, layer.running_mean, layer.running_var, layer.weight, layer.bias, train, 0.1, 1e-3
    )


def conv(layer, x):
    arguments = (layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    return F.conv2d(x, *arguments)


def block(layer, x, train):
    y = x
    for part in (layer.conv1, layer.conv2):
        if isinstance(part, ConvNorm2d):
            y = norm(part.norm, conv(part.conv, y), train)
        else:
            y = norm(part.norm_outer, conv(part.second, F.relu(conv(part.first, y))), train)
        y = F.relu(y) if part is layer.conv1 else y
    return F.relu(y + x)


def down(layer, x, train):
    both = torch.cat([conv(layer.conv, x), F.max_pool2d(x, 2, 2, ceil_mode=True)], 1)
    return F.relu(norm(layer.norm, both, train))


def up(layer, x, train):
    y = F.conv_transpose2d(x, layer.conv.weight, layer.conv.bias, 2, 1, 1)
    return F.relu(norm(layer.norm, y, train))


EXPECTED = {"block": block, "down": down, "up": up}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_equals_plain_torch(name, grad, train, size):
    layer = made(name, train)
    if name.startswith("block"):
        layer.dropout.p = 0.0
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = EXPECTED[name.split()[0]](twin, x, train)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10, check_stride=False)
    if grad:
        weight = torch.randn_like(expected)
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
        for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_folded_weights_follow_the_weights(name):
    layer = made(name)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            layer(x)
            if tensor.is_floating_point():
                tensor.mul_(1.25)
            expected = EXPECTED[name.split()[0]](layer, x, False)
            torch.testing.assert_close(layer(x), expected, check_stride=False)
        layer.float().double()
        expected = EXPECTED[name.split()[0]](layer, x, False)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10, check_stride=False)


def test_every_norm_has_the_papers_epsilon():
    for name in LAYERS:
        norms = [m for m in LAYERS[name]().modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {n.eps for n in norms} == {1e-3}


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_takes_whole_channels_of_the_residual_in_training(dense):
    layer = NonBottleneck1d(64, 0.5, dense=dense)
    x = torch.rand(2, 64, 5, 5)
    y = layer(x)
    # A dropped channel leaves the input, which is positive.
    dropped = (y == x).flatten(2).all(2)
    assert 0.3 < dropped.float().mean() < 0.7
    layer.dropout.p = 1.0
    assert torch.equal(layer(x), x)
    assert not torch.equal(layer.eval()(x), x)


def test_parameters_of_the_papers_table():
    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    assert count(Downsampler(3, 16)) == 396
    assert count(Downsampler(16, 64)) == 7088
    assert count(Downsampler(64, 128)) == 37184
    assert [count(NonBottleneck1d(c)) for c in (16, 64, 128)] == [3200, 49664, 197632]
    assert count(Upsampler(128, 64)) == 73920
    assert count(Upsampler(64, 16)) == 9264


def test_conv_norm_of_any_convolution():
    layer = randomise_norms(ConvNorm2d(nn.Conv2d(4, 6, 3, 2, 1, 2, 2, bias=False))).double().eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    residual = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    kept = residual.clone()
    expected = F.silu(layer.norm(layer.conv(x)) + residual)
    torch.testing.assert_close(layer(x, residual, "silu"), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, residual, "silu"), expected.detach())
    assert torch.equal(residual, kept)


def test_errors():
    with pytest.raises(ValueError, match=r"NonBottleneck1d: dropout must be in \[0, 1\], got 1.5"):
        NonBottleneck1d(4, 1.5)
    for dense in (False, True):
        with pytest.raises(ValueError, match="NonBottleneck1d: kernel_size must be odd, got 4"):
            NonBottleneck1d(4, kernel_size=4, dense=dense)
    with pytest.raises(ValueError, match="Downsampler: out_channels must be more than in_channels"):
        Downsampler(4, 4)
    with pytest.raises(ValueError, match="ConvNorm2d: conv must have one group, got 2"):
        ConvNorm2d(nn.ConvTranspose2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="ConvNorm2d: outer must be one of None, 'relu'"):
        ConvNorm2d(nn.Conv2d(2, 2, 1))(torch.randn(1, 2, 3, 3), outer="gelu")
