import pytest
import torch
from torch import nn

from pyeff.compress import OrthoReg, repulsion


@pytest.mark.parametrize("scale", [7.0, 10.0])
def test_coefficients_are_half_of_autograds(scale):
    unit = torch.nn.functional.normalize(torch.randn(9, 12, dtype=torch.float64))
    unit[3] = torch.nn.functional.normalize(unit[2] + 0.1 * unit[3], dim=0)  # nearly the same
    unit.requires_grad_()
    cosines = unit @ unit.T
    off = ~torch.eye(9, dtype=torch.bool)
    torch.log1p(torch.exp(scale * (cosines - 1)))[off].sum().backward()
    ours = repulsion(cosines.detach(), scale) @ unit.detach()
    torch.testing.assert_close(ours, unit.grad / 2, rtol=1e-12, atol=1e-12)


def test_coefficients_are_the_papers_and_not_the_public_files():
    cosines = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    grid = torch.zeros(5, 5, dtype=torch.float64)
    grid[0, 1:] = cosines
    found = repulsion(grid)[0, 1:]
    torch.testing.assert_close(
        found, torch.tensor([3.4e-3, 0.067, 1.19, 5.0]).double(), rtol=0.02, atol=0
    )


def test_a_step_is_the_formula_and_spares_biases():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, groups=2))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    grouped = net[2].weight.detach().clone()
    OrthoReg(net, beta=0.5).after_step(lr=0.1)

    def expected(rows):
        unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-7)
        return rows - 0.05 * repulsion(unit @ unit.T) @ unit

    torch.testing.assert_close(net[0].weight.flatten(1), expected(weight.flatten(1)))
    halves = [expected(half) for half in grouped.flatten(1).chunk(2)]
    torch.testing.assert_close(net[2].weight.flatten(1), torch.cat(halves))
    assert torch.equal(net[0].bias, bias)


def test_transposed_filters_are_moved_as_those_of_a_convolution():
    conv, up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)
    with torch.no_grad():
        up.weight.copy_(conv.weight.transpose(0, 1))
    for net in (conv, up):
        OrthoReg(net, beta=1.0).after_step(lr=0.1)
    torch.testing.assert_close(up.weight.transpose(0, 1), conv.weight)


def test_filters_that_point_the_same_way_are_pushed_apart():
    conv = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        conv.weight[1] = conv.weight[0] + 0.05 * torch.randn(3, 3, 3)

    def cosine():
        return float(torch.cosine_similarity(*conv.weight.detach()[:2].flatten(1), dim=0))

    before, opposite = cosine(), conv.weight[2].detach().clone()
    regulariser = OrthoReg(conv, beta=0.1)
    for _ in range(20):
        regulariser.after_step(lr=0.1)
    assert cosine() < before - 0.05
    torch.testing.assert_close(conv.weight[2].detach(), opposite, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrthoReg(nn.Conv2d(3, 4, 1), beta=-1), "OrthoReg: beta must not be negative"),
        (lambda: OrthoReg(nn.Conv2d(3, 4, 1), scale=-1), "OrthoReg: scale must not be negative"),
        (lambda: OrthoReg(nn.Linear(3, 4)), "OrthoReg: model must have convolutions of more"),
        (lambda: OrthoReg(nn.Conv2d(4, 4, 3, groups=4)), "model must have convolutions of more"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
