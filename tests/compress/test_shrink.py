"""``shrink`` removes what is dead, for real, and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compress.shrink_cases import NETWORKS, Residual, X, image, network, zero
from compress.zeroing import assert_lost, kill, parameters
from torch import nn

from pyeff.compress import channel_groups
from pyeff.compress.shrink import shrink, shrink_with_report


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_dead_channels_go_and_the_outputs_stay(name, seed):
    model = network(name)
    torch.manual_seed(seed)
    x = image(model)
    lost = kill(model, x)
    before = copy.deepcopy(model.state_dict())
    small, report = shrink_with_report(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    assert_lost(model, small, report, lost)
    assert report.cut_difference <= report.tolerance == 1e-9
    assert report.difference < 1e-11
    assert parameters(small) < parameters(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_channel_that_only_happens_to_be_silent_stays():
    model = network("residual")
    x = image(model)
    with torch.no_grad():
        # Alive, but below zero for every image that anyone would try.
        model.norm1.bias[0] = -50
        # Dead in one summand only, and the other one is silent by its bias.
        zero(model.conv2, slice(0, 3))
        model.stem.bias[:3] = -50
    small, report = shrink_with_report(model, x)
    assert parameters(small) == parameters(model)
    assert sum(sum(why.values()) for why in report.kept.values()) == 3
    assert all("sees live values" in reason for why in report.kept.values() for reason in why)


def test_a_live_gate_does_not_keep_what_is_zero():
    model = network("gated")
    with torch.no_grad():
        model.expand.weight[:4] = 0
        model.depth.weight[:4] = 0
        for layer in (model.norm1, model.norm2):
            layer.weight[:4] = 0
            layer.bias[:4] = 0
    x = image(model)
    small = shrink(model, x)
    assert small.project.in_channels == 8
    assert small.excite.out_channels == 8
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_filters_that_read_dead_channels_only_go_too():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).double()
    zero(model[0], slice(0, 3))
    with torch.no_grad():
        model[2].weight[:2, 3:] = 0
    x = image(model)
    small, report = shrink_with_report(model, x)
    assert report.channels == {"0": (8, 5), "2": (6, 4)}
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    moved = report.carry("2.weight", model[2].weight)
    assert torch.equal(moved, small[2].weight)
    assert torch.equal(report.carry("4.bias", model[4].bias), model[4].bias)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 5, 6), (2, 5, 4, 6)])
def test_linear_layers_take_vectors_of_any_arrangement(shape):
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)).double()
    zero(model[0], slice(0, 4))
    x = image(model, shape)
    small = shrink(model, x)
    assert (small[0].out_features, small[2].in_features) == (8, 8)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_small_filters_count_as_zero_below_the_threshold():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 4, 3))
    x = torch.randn(X)
    with torch.no_grad():
        model[0].weight[:3] *= 1e-6
        model[1].weight[:, :2] *= 1e-6
        model[0].bias[:3] = 0
    assert parameters(shrink(model, x)) == parameters(model)
    before = model[0].weight.clone()
    small, report = shrink_with_report(model, x, threshold=1e-5)
    assert (small[0].out_channels, small[1].out_channels) == (5, 4)
    assert torch.equal(model[0].weight, before)
    assert 0 < report.difference < 1e-4


def test_only_the_groups_that_are_named():
    model = network("chain")
    x = image(model)
    zero(model[0], slice(0, 3))
    zero(model[2], slice(0, 3))
    first = [group for group in channel_groups(model, x) if group.name == "0"]
    small = shrink(model, x, groups=first)
    assert (small[0].out_channels, small[2].out_channels) == (5, 6)


def test_channels_are_rounded_up_to_a_multiple():
    model = network("concat")
    x = image(model)
    zero(model.a, slice(0, 3))
    zero(model.b, slice(0, 5))
    report = shrink_with_report(model, x, round_to=4)[1]
    # 2 of 5 become 4, 2 of 7 become 4.
    assert report.channels == {"a": (5, 4), "b": (7, 4)}
    assert report.round_to == 4
    assert report.kept == {"a": {"rounded up to 4": 2}, "b": {"rounded up to 4": 2}}
    assert shrink(model, x, round_to=8).a.out_channels == 5


def test_the_multiple_is_chosen_by_time():
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 24, 3)).eval()
    zero(model[0], slice(0, 23))
    x = torch.randn(1, 3, 16, 16)
    small, report = shrink_with_report(model, x, round_to="auto")
    # 17, 20, 24 and 32 channels.
    assert set(report.seconds) == {1, 4, 8, 16}
    best = min(report.seconds.values())
    assert report.seconds[report.round_to] <= best * 1.02
    assert small[0].out_channels == {1: 17, 4: 20, 8: 24, 16: 32}[report.round_to]
    assert f"rounded up to {report.round_to}" in str(report)
    torch.testing.assert_close(small(x), model(x))


def test_a_network_with_sizes_of_its_own_keeps_those_channels():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            y = self.b(F.relu(self.a(x)))
            if y.shape[1] != 8:
                raise RuntimeError("eight channels, please")
            return self.c(F.relu(y))

    model = Fixed().double()
    zero(model.a, slice(0, 3))
    zero(model.b, slice(0, 3))
    x = image(model)
    small, report = shrink_with_report(model, x)
    assert (small.a.out_channels, small.b.out_channels) == (5, 8)
    assert report.kept == {"b": {"without them: RuntimeError: eight channels, please": 3}}
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_mode_precision_and_layout_are_those_of_the_given_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)
    ).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    model[2].eval()
    model[0].weight.requires_grad_(False)
    zero(model[0], slice(0, 3))
    x = torch.randn(X).bfloat16()
    small = shrink(model, x)
    assert [m.training for m in small] == [True, True, False, True]
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[0].weight.requires_grad
    assert small[3].weight.requires_grad


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_bad_input_is_named_and_changes_nothing():
    model = network("norms")
    x = image(model)
    before = state(model)
    for options, message in (
        ({"threshold": -1}, "threshold must not be negative, got -1"),
        ({"constants": "drop"}, "constants must be 'fold' or 'keep', got 'drop'"),
        ({"round_to": 0}, "round_to must be a positive int, 'auto' or None, got 0"),
        ({"round_to": "fast"}, "round_to must be a positive int, 'auto' or None, got 'fast'"),
        ({"groups": channel_groups(Residual(), torch.randn(X))}, "groups must be of this model"),
    ):
        with pytest.raises(ValueError, match=f"shrink: {message}"):
            shrink(model, x, **options)
    with pytest.raises(TypeError, match=r"shrink: model must be an nn\.Module, got int"):
        shrink(3, x)
    with pytest.raises(TypeError, match=r"shrink: example must be a tensor .* got str"):
        shrink(model, "image")
    with pytest.raises(
        ValueError, match=r"example must be an input that the model takes, got \[\[2, 4"
    ):
        shrink(model, torch.randn(2, 4, 12, 12).double())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_layer_must_keep_a_channel():
    model = network("norms")
    x = image(model)
    zero(model[3], slice(None))
    before = state(model)
    with pytest.raises(
        ValueError, match=r"every layer must keep a channel, got 3 with all 6 of its out"
    ):
        shrink(model, x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_network_that_autograd_cannot_follow():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x).detach()

    with pytest.raises(ValueError, match="model must"):
        shrink(Detached(), torch.randn(X))
