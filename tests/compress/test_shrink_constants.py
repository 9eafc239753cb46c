"""What dead channels still carry goes into the layers that read it."""

import copy

import pytest
import torch
from compress.shrink_cases import NETWORKS, chain, conv, image, norm, zero
from compress.zeroing import randomise_norms
from torch import nn

from pyeff.compress import channel_groups
from pyeff.compress.shrink import shrink, shrink_with_report

UNPADDED = {
    "chain": chain(conv(3, 8, 3), nn.ReLU, conv(8, 6, 3), nn.ReLU, conv(6, 4, 1)),
    "norms": NETWORKS["norms"],
    "flattened": NETWORKS["flattened"],
    "depthwise": chain(
        conv(3, 8, 1), norm(8), nn.SiLU, conv(8, 8, 3, groups=8), norm(8), conv(8, 4, 1)
    ),
    "transposed": chain(
        lambda: nn.ConvTranspose2d(3, 6, 3, 1, 2),
        nn.SiLU,
        lambda: nn.ConvTranspose2d(6, 4, 3, 1, 2),
    ),
    "instance norm": NETWORKS["instance norm"],
    "volumes": chain(
        lambda: nn.Unflatten(1, (1, 3)),
        lambda: nn.Conv3d(1, 6, 2),
        nn.SiLU,
        lambda: nn.Conv3d(6, 2, 2),
    ),
}


@pytest.mark.parametrize("name", UNPADDED)
def test_what_norms_and_biases_make_of_zero_is_folded(name):
    model = UNPADDED[name]().double().eval()
    randomise_norms(model)
    x = image(model)
    lost = 0
    with torch.no_grad():
        for group in channel_groups(model, x):
            for producer in group.producers:
                # Biases stay, so that every dead channel carries a number.
                layer = model.get_submodule(producer)
                turned = isinstance(layer, nn.ConvTranspose2d)
                (layer.weight.transpose(0, 1) if turned else layer.weight)[:2] = 0
            lost += 2
    small, report = shrink_with_report(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    assert not report.borders
    before, after = channel_groups(model, x), channel_groups(small, x)
    assert sum(g.channels for g in before) - sum(g.channels for g in after) == lost > 0


def padded_pair():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
    ).double()
    randomise_norms(model)
    zero(model[0], slice(0, 3))
    with torch.no_grad():
        model[1].running_mean[:3] = 0
        model[1].bias[:3] = torch.tensor([0.7, -0.4, 0.9])
    return model.eval()


def test_the_border_is_what_folding_changes_and_keeping_does_not():
    model = padded_pair()
    x = image(model)
    small, report = shrink_with_report(model, x)
    assert small[0].out_channels == 5
    found, wanted = small(x), model(x)
    torch.testing.assert_close(
        found[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], rtol=1e-12, atol=1e-12
    )
    assert report.borders
    largest = float(((found - wanted).abs().max() / wanted.abs().max()).detach())
    assert largest > 0.01
    assert report.difference == pytest.approx(largest)
    assert "borders differ" in str(report)
    exact, kept = shrink_with_report(model, x, constants="keep")
    # The second channel's constant is cut off by the ReLU.
    assert exact[0].out_channels == 7
    torch.testing.assert_close(exact(x), wanted, rtol=1e-12, atol=1e-12)
    assert kept.kept == {"0": {"their constant meets the borders of 3": 2}}
    assert not kept.borders


@pytest.mark.parametrize(
    ("bias", "follower", "has_bias"),
    [
        (True, nn.BatchNorm2d(4), True),
        (False, nn.BatchNorm2d(4), False),
        (False, nn.BatchNorm2d(4, track_running_stats=False), True),
        (False, nn.ReLU(), True),
    ],
    ids=["bias", "norm", "norm without statistics", "new bias"],
)
def test_where_a_constant_goes(bias, follower, has_bias):
    follower = copy.deepcopy(follower)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=bias), follower)
    model = model.double().eval()
    zero(model[0], slice(0, 2), bias=False)
    x = image(model)
    small = shrink(model, x)
    assert small[0].out_channels == 4
    assert (small[1].bias is not None) == has_bias
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    assert all(p.requires_grad for p in small.parameters())


def test_a_norm_that_is_not_the_only_reader_keeps_its_mean():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.b(self.a(x))
            return self.norm(y) + y

    model = Both().double().eval()
    randomise_norms(model)
    zero(model.a, slice(0, 2), bias=False)
    x = image(model)
    small = shrink(model, x)
    assert small.a.out_channels == 4
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
