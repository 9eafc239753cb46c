"""Pairs made of the spatial singular value decomposition of a convolution."""

import pytest
import torch
from torch import nn

from pyeff.nn import FactorizedConv2d


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": 2, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "bias": False},
        {"kernel_size": 5, "padding": 2, "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["vertical_first", "horizontal_first"])
@pytest.mark.parametrize("channels", [(3, 5), (5, 3)])
def test_from_conv_is_exact_at_full_rank(options, order, channels):
    plain = nn.Conv2d(*channels, **{"kernel_size": 3, **options}).double()
    pair = FactorizedConv2d.from_conv(plain, order=order)
    assert pair.rank == plain.kernel_size[0] * min(channels)
    assert pair.order == order
    x = torch.randn(2, channels[0], 9, 8, dtype=torch.float64)
    assert_same(pair(x), plain(x))


def test_from_conv_at_lower_rank_is_the_nearest():
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    matrix = plain.weight.detach().permute(1, 2, 0, 3).reshape(12, 18)  # (i, y), (o, x)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 5, 11):
        pair = FactorizedConv2d.from_conv(plain, rank)
        left = pair.first.weight.detach().reshape(rank, 12).T
        right = pair.second.weight.detach().permute(1, 0, 2, 3).reshape(rank, 18)
        assert_same((matrix - left @ right).norm(), values[rank:].norm())


def test_from_conv_with_an_activation_is_a_start():
    plain = nn.Conv2d(4, 6, 3, padding=1).double().eval()
    pair = FactorizedConv2d.from_conv(plain, 6, inner="relu")
    assert pair.inner == "relu"
    assert not pair.training
    assert pair.first.bias.count_nonzero() == 0
    assert torch.equal(pair.second.bias, plain.bias)
    assert pair.first.weight.requires_grad


def test_from_conv_keeps_dtype_and_weights():
    plain = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16)
    before = plain.weight.clone()
    pair = FactorizedConv2d.from_conv(plain)
    assert pair.first.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, before)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "FactorizedConv2d: groups must be 1, got 2"),
        (nn.Conv2d(4, 4, 4), "FactorizedConv2d: kernel_size must be odd"),
        (nn.Conv2d(4, 4, (3, 5)), "FactorizedConv2d: kernel_size must be one int for both axes"),
        (nn.Conv2d(4, 4, 3, (1, 2)), "FactorizedConv2d: stride must be one int for both axes"),
        (
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "FactorizedConv2d: padding_mode must be 'zeros', got 'reflect'",
        ),
    ],
)
def test_from_conv_refuses(conv, message):
    with pytest.raises(ValueError, match=message):
        FactorizedConv2d.from_conv(conv)


@pytest.mark.parametrize("rank", [0, 13])
def test_from_conv_refuses_a_rank(rank):
    with pytest.raises(ValueError, match=rf"FactorizedConv2d: rank must be in 1\.\.12, got {rank}"):
        FactorizedConv2d.from_conv(nn.Conv2d(4, 5, 3), rank)


def test_from_conv_refuses_other_layers():
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d, got Linear"):
        FactorizedConv2d.from_conv(nn.Linear(2, 2))
