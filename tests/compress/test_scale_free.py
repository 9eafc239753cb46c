"""Layers that only a batch norm reads keep their scale under penalties."""

import copy

import pytest
import torch
from torch import nn

from pyeff.compress import Compressor, GroupSparsity, LowRank
from pyeff.compress.scale_free import KeptScale, scale_free_layers
from pyeff.models import build


class Wired(nn.Module):
    """Layers that a norm alone reads, and others."""

    def __init__(self):
        super().__init__()
        self.free, self.free_norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.both, self.both_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # a sum reads it too
        self.bare = nn.Conv2d(6, 4, 1)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 1)
        self.twin, self.twin_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.twin.weight = self.shared.weight
        self.twice, self.twice_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.flat, self.flat_norm = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.free_norm(self.free(x)).relu()
        y = self.both(x)
        x = self.both_norm(y) + y
        x = self.up_norm(self.up(self.bare(x).relu()))
        x = self.twin_norm(self.twin(self.shared(x)))
        x = self.twice_norm(self.twice(x)) + self.twice(x)
        x = self.flat_norm(self.flat(x.mean((2, 3)).relu()))
        return self.head(x)


FREE = {"free": "free_norm", "up": "up_norm", "flat": "flat_norm"}


@pytest.fixture
def net():
    net = Wired().double().train()
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eps = 1e-14  # the shorter a filter is, the more it counts
    return net


@pytest.fixture
def x():
    return torch.randn(5, 3, 9, 8, dtype=torch.float64)


def test_only_layers_that_a_norm_alone_reads(net, x):
    assert scale_free_layers(net, (x,)) == FREE
    assert net.training


def test_of_the_networks_of_the_benchmarks():
    example = torch.randn(1, 3, 32, 32)
    resnet = build(
        {"family": "backbone", "name": "resnet20", "classes": 10, "preactivation": False}
    )
    convs = [n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(scale_free_layers(resnet, (example,))) == convs
    pairs = build({"family": "decomposeme", "width": [8] * 8, "pools": [1, 2], "norm": "both"})
    convs = [n for n, m in pairs.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(scale_free_layers(pairs, (example,))) == convs


@pytest.mark.parametrize("training", [True, False])
def test_restoring_changes_no_output(net, x, training):
    kept = KeptScale(net, FREE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x)  # statistics
    before = kept.lengths()
    with torch.no_grad():
        for name, factor in zip(FREE, (0.1, 0.5, 3.0), strict=True):
            layer, norm = net.get_submodule(name), net.get_submodule(FREE[name])
            layer.weight.mul_(factor)
            if layer.bias is not None:
                layer.bias.mul_(factor)
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
    net.train(training)
    expected = copy.deepcopy(net)(x)
    kept.restore(before, optimizer)
    torch.testing.assert_close(net(x), expected)
    net.train()
    for name, lengths in kept.lengths().items():
        torch.testing.assert_close(lengths, before[name])


def test_dead_filters_stay_dead_and_the_live_keep_their_ratios(net):
    kept = KeptScale(net, FREE)
    before = kept.lengths()["free"]
    with torch.no_grad():
        net.free.weight[:2] = 0
        net.free.weight[2] *= 0.5
    shortened = kept.lengths()["free"]
    kept.restore({"free": before}, torch.optim.SGD(net.parameters(), lr=0.1))
    after = kept.lengths()["free"]
    assert not after[:2].any()
    torch.testing.assert_close(after[2:].mean(), before[2:].mean())
    ratios = after[2:] / shortened[2:]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_a_layer_that_is_all_dead_is_left_alone(net):
    kept = KeptScale(net, FREE)
    before = kept.lengths()
    nn.init.zeros_(net.free.weight)
    kept.restore(before, torch.optim.SGD(net.parameters(), lr=0.1))
    assert not net.free.weight.any()
    assert torch.isfinite(net.free.bias).all()


def test_norms_that_do_not_use_the_batch_are_not_looked_at(net):
    net.free_norm.eval()
    assert set(KeptScale(net, FREE).lengths()) == {"up", "flat"}


@pytest.mark.parametrize(
    ("make", "power"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), {"momentum_buffer": 1}),
        (lambda p: torch.optim.Adam(p, lr=0.0), {"exp_avg": 1, "exp_avg_sq": 2}),
    ],
)
def test_buffers_are_what_the_longer_filters_would_have_given(net, x, make, power):
    optimizer = make(net.parameters())
    net(x).square().sum().backward()
    optimizer.step()
    kept = KeptScale(net, FREE)
    before = {name: 4 * lengths for name, lengths in kept.lengths().items()}
    held = {k: optimizer.state[net.free.weight][k].clone() for k in power}
    kept.restore(before, optimizer)
    for key, p in power.items():
        got = optimizer.state[net.free.weight][key]
        torch.testing.assert_close(got, held[key] / 4**p)
    untouched = optimizer.state[net.bare.weight][next(iter(power))]
    longer = copy.deepcopy(net)
    for parameter in longer.parameters():
        parameter.grad = None
    longer(x).square().sum().backward()
    expected = longer.bare.weight.grad * (0.1 if "exp_avg" in power else 1)
    torch.testing.assert_close(untouched, expected)
    expected = longer.free.weight.grad * (0.1 if "exp_avg" in power else 1)
    got = optimizer.state[net.free.weight][next(iter(power))]
    torch.testing.assert_close(got, expected)


def chain():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 4),
    )  # fmt: skip


def penalised(keep_scale, *, every="epoch", include_norm=False):
    net, x = chain(), torch.randn(4, 3, 8, 8)
    common = {
        "strength": "auto",
        "target_params": 0.5,
        "schedule": [0.1] * 4,
        "every": every,
        "steps_per_epoch": 3,
    }
    group = GroupSparsity(net, x, floor=2, include_norm=include_norm, **common)
    rank = LowRank(net, **common)
    compressor = Compressor(net, x, group=group, rank=rank, keep_scale=keep_scale)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    compressor.attach(optimizer)
    return net, compressor, optimizer


def mean_length(layer):
    lengths = layer.weight.detach().flatten(1).norm(dim=1)
    return lengths[lengths > 0].mean().item()


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize("keep_scale", [True, False])
def test_penalties_shorten_filters_only_where_it_is_asked_for(keep_scale, every):
    net, compressor, optimizer = penalised(keep_scale, every=every)
    before = mean_length(net[0])
    for _ in range(2):
        for _ in range(3):
            optimizer.step()  # no gradient: nothing but the penalties acts
            compressor.after_step(0.1)
        compressor.end_epoch(0.1)
    after = mean_length(net[0])
    if keep_scale:
        assert after == pytest.approx(before, rel=0.2)  # of those that live now
    else:
        assert after < 0.7 * before


def test_the_target_is_met_with_the_scale_kept():
    net, compressor, optimizer = penalised(True)
    x, y = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    for _ in range(4):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            compressor.after_step(0.1)
        compressor.end_epoch(0.1)
    assert compressor.statistics()["group"]["share"] <= 0.5 + 1e-6


def test_norms_within_the_groups_have_a_scale_that_counts():
    net, compressor, _ = penalised(True, include_norm=True)
    before = mean_length(net[0])
    compressor.end_epoch(0.1)
    assert mean_length(net[0]) < 0.95 * before
