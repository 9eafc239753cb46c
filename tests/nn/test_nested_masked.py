"""Layers with nested sets of weights."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from pyeff.nn import NestedMaskedConv2d, NestedMaskedLinear


def test_masks_are_nested_and_keep_the_largest():
    conv = NestedMaskedConv2d(8, 16, 3, padding=1, levels=3).double()
    conv.set_density([0.25, 0.5, 0.9])
    masks = [conv.mask(level) for level in (1, 2, 3)]
    total = conv.weight.numel()
    assert [int(mask.sum()) for mask in masks] == [total // 4, total // 2, round(0.9 * total)]
    for low, high in pairwise(masks):
        assert (low <= high).all()
    assert conv.weight.abs()[masks[0]].min() >= conv.weight.abs()[~masks[0]].max()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    expected = F.conv2d(x, conv.weight * masks[0], conv.bias, padding=1)
    torch.testing.assert_close(conv(x, 1), expected)


def test_masked_weights_get_no_gradient():
    linear = NestedMaskedLinear(8, 6, levels=2)
    linear.set_density([0.5, 1.0])
    linear(torch.randn(3, 8), 1).square().sum().backward()
    assert (linear.weight.grad[~linear.mask(1)] == 0).all()
    assert (linear.weight.grad[linear.mask(1)] != 0).any()


def test_masks_are_in_the_state_dict():
    linear = NestedMaskedLinear(8, 6, levels=2)
    linear.set_density([0.5, 1.0])
    other = NestedMaskedLinear(8, 6, levels=2)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.mask(1), linear.mask(1))
    assert int(other.mask(1).sum()) == 24


@pytest.mark.parametrize("densities", [[0.5], [0.6, 0.5], [0.0, 1.0], [0.5, 1.1]])
def test_density_errors(densities):
    with pytest.raises(ValueError, match="densities must be 2 rising shares"):
        NestedMaskedLinear(8, 6, levels=2).set_density(densities)


def test_level_errors():
    layer = NestedMaskedLinear(8, 6, levels=2)
    with pytest.raises(ValueError, match=r"level must be in 1\.\.2, got 3"):
        layer(torch.randn(1, 8), 3)
    with pytest.raises(ValueError, match=r"levels must be in 1\.\.254, got 0"):
        NestedMaskedLinear(8, 6, levels=0)
