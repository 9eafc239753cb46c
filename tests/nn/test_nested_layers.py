"""NestedConv2d and NestedLinear: drop-in, sliced, with gradients only where active."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.nn import NestedConv2d, NestedLinear


def test_conv_without_ranges_is_torch_conv():
    ours, theirs = NestedConv2d(6, 10, 3, 2, 1).double(), nn.Conv2d(6, 10, 3, 2, 1).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_conv_ranges_slice_the_weight(bias):
    conv = NestedConv2d(6, 10, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    got = conv(x, in_range=(2, 5), out_range=(1, 8))
    part = None if conv.bias is None else conv.bias[1:8]
    torch.testing.assert_close(
        got, F.conv2d(x, conv.weight[1:8, 2:5], part, padding=1), rtol=1e-12, atol=1e-12
    )


def test_conv_gradients_are_zero_outside_the_ranges():
    conv = NestedConv2d(6, 10, 3, padding=1).double()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    conv(x, in_range=(2, 5), out_range=(1, 8)).square().sum().backward()
    inside = torch.zeros_like(conv.weight, dtype=torch.bool)
    inside[1:8, 2:5] = True
    assert (conv.weight.grad[~inside] == 0).all()
    assert (conv.weight.grad[inside] != 0).all()
    assert (conv.bias.grad[[0, 8, 9]] == 0).all()


def test_grouped_conv_runs_whole_groups():
    conv = NestedConv2d(8, 12, 3, padding=1, groups=4).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    got = conv(x, in_range=(2, 6), out_range=(3, 9))
    expected = F.conv2d(x, conv.weight[3:9], conv.bias[3:9], padding=1, groups=2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_conv_works_in_any_network_and_stays_channels_last():
    net = nn.Sequential(NestedConv2d(3, 8, 3, padding=1), nn.ReLU(), NestedConv2d(8, 4, 1))
    y = net(torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_linear_slices_and_zero_gradients():
    linear = NestedLinear(8, 5).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    got = linear(x, in_range=(2, 6), out_range=(1, 4))
    torch.testing.assert_close(got, F.linear(x, linear.weight[1:4, 2:6], linear.bias[1:4]))
    got.square().sum().backward()
    inside = torch.zeros_like(linear.weight, dtype=torch.bool)
    inside[1:4, 2:6] = True
    assert (linear.weight.grad[~inside] == 0).all()
    assert (linear.weight.grad[inside] != 0).all()


def test_linear_state_dict_is_torchs():
    assert list(NestedLinear(8, 5).state_dict()) == list(nn.Linear(8, 5).state_dict())
    assert list(NestedConv2d(3, 5, 1).state_dict()) == list(nn.Conv2d(3, 5, 1).state_dict())


@pytest.mark.parametrize("interval", [(0, 9), (-1, 4), (4, 4), (5, 2)])
def test_linear_range_errors(interval):
    with pytest.raises(ValueError, match="NestedLinear: in_range must be"):
        NestedLinear(8, 5)(torch.randn(1, 4), in_range=interval)
    with pytest.raises(ValueError, match="NestedLinear: out_range must be"):
        NestedLinear(4, 8)(torch.randn(1, 4), out_range=interval)
