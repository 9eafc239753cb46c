"""Which layers the penalties act on: those that can be made smaller, and that are trained."""

import copy

import pytest
import torch
from torch import nn

from pyeff.compress import Compressor, GroupSparsity, LowRank, OrthoReg, factorize
from pyeff.compress.factorize import factorize_with_report
from pyeff.compress.rank_rules import RankRule

X = torch.randn(2, 3, 8, 8)


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, 10)),
    )


def test_low_rank_is_asked_of_layers_that_can_be_factored():
    model = nn.Sequential(
        *(nn.Conv1d(8, 64, 5), nn.ReLU(), nn.Conv1d(64, 64, 5), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    before = copy.deepcopy(model.state_dict())
    low_rank = LowRank(model, strength=0.5)
    assert low_rank.layers == ("6", "8")
    assert low_rank.left_out == dict.fromkeys(
        ("0", "2"), "a Conv1d is none of Conv2d, ConvTranspose2d, Linear"
    )
    low_rank.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    low_rank.end_epoch(0.1)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["6.weight", "8.weight"]
    # The convolutions alone are more than half of the network.
    with pytest.raises(ValueError, match=r"target_params must be at least 0\.8"):
        LowRank(model, target_params=0.5, schedule=[0.1])
    message = "got none that can be penalised: 0: a Conv1d is none of"
    with pytest.raises(ValueError, match=message):
        LowRank(nn.Sequential(nn.Conv1d(8, 64, 5)), strength=0.5)


def test_low_rank_and_factorize_leave_the_same_layers():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(16, 2),
            "up": nn.ConvTranspose1d(8, 8, 3),
            "volume": nn.Conv3d(8, 8, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "plain": nn.Linear(8, 8),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    low_rank = LowRank(model, strength=0.5)
    assert low_rank.layers == ("plain",)
    report = factorize_with_report(model, RankRule(rank=1), only_if="always")[1]
    assert report.factored == low_rank.layers
    reasons = {layer.name: layer.left for layer in report.layers}
    assert {"attention.out_proj", "up", "volume", "hooked"} <= set(low_rank.left_out)
    assert all(reasons[name] == why for name, why in low_rank.left_out.items())


@pytest.mark.parametrize("penalty", ["group", "rank", "ortho"])
@pytest.mark.parametrize("held", ["all", "trained"])
def test_what_takes_no_gradient_is_left_as_it_is(penalty, held):
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad or held == "all"]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    if penalty == "ortho":
        OrthoReg(model, beta=1.0).after_step(lr=0.1)
    else:
        made = {
            "group": lambda: GroupSparsity(model, X, strength=0.5, first_layers=0),
            "rank": lambda: LowRank(model, strength=0.5),
        }[penalty]()
        assert made.left_out["0"].endswith("takes no gradient")
        made.attach(optimizer)
        made.end_epoch(0.1)
    torch.testing.assert_close(model[0].state_dict(), before, rtol=0, atol=0)


def test_adam_may_train_a_part():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    low_rank = LowRank(model, strength=0.5)
    compressor = Compressor(model, X, rank=low_rank)
    compressor.attach(optimizer)
    model(X).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    compressor.end_epoch(1e-3)
    torch.testing.assert_close(model[0].state_dict()["weight"], before["0.weight"], rtol=0, atol=0)
    assert "0" not in low_rank.layers
    for name in low_rank.layers:
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


def test_weights_that_are_shared_are_left_out():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    low_rank = LowRank(model, strength=0.5)
    assert low_rank.layers == ("3",)
    low_rank.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    table = nn.Embedding(16, 16)
    tied = nn.Sequential(table, nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        table.weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16))
    tied[2].weight = table.weight
    small = factorize(tied, rank=2, only_if="always")
    assert small[2].weight is small[0].weight


def test_rounding_is_no_rank():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(32, 10) @ torch.randn(10, 32) / 6)
    low_rank = LowRank(model, target_params=0.5, schedule=[0.1])
    low_rank.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    low_rank.end_epoch(0.1)
    ranks = low_rank.statistics()["ranks"]
    assert ranks == low_rank.ranks()
    assert ranks["0"] < 10
    # Of equal layers neither pays for the other.
    assert ranks["2"] >= 5


def test_a_pair_takes_gradients_where_its_layer_did():
    layer = nn.Linear(16, 16)
    layer.bias.requires_grad_(False)
    pair = factorize(nn.Sequential(layer), rank=2, only_if="always")[0]
    assert [p.requires_grad for p in pair.parameters()] == [True, True, False]


def test_a_state_of_another_width_is_refused():
    def penalty(width):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))
        made = GroupSparsity(model, X, strength=0.1)
        made.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        return made

    wide, narrow = penalty(64), penalty(32)
    wide.end_epoch(0.1)
    before = narrow.state_dict()
    with pytest.raises(ValueError, match=r"state must be of \{'0': 32\} channels, got one of .*64"):
        narrow.load_state_dict(wide.state_dict())
    assert narrow.state_dict() == before
    # A state that an earlier version wrote has no widths.
    older = {k: v for k, v in penalty(32).state_dict().items() if k != "channels"}
    narrow.load_state_dict(older)


def test_a_state_with_channels_out_of_range_changes_nothing():
    def penalty(width):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))
        return GroupSparsity(model, X, strength=0.1)

    narrow = penalty(32)
    before = narrow.state_dict()
    # As an earlier version wrote it, without widths.
    older = penalty(64).state_dict() | {"epochs": 3, "masked": {"0": [3, 32]}}
    del older["channels"]
    message = "state must be of 32 channels of '0', got one with channel 32"
    with pytest.raises(ValueError, match=message):
        narrow.load_state_dict(older)
    assert narrow.state_dict() == before


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_group_is_left_out_where_one_member_takes_no_gradient(part):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.branch = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.other = nn.Conv2d(16, 16, 3)
            self.head = nn.Conv2d(16, 4, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.other(x + self.branch(x)).relu())

    model = Residual()
    model.stem.get_parameter(part).requires_grad_(False)
    sparsity = GroupSparsity(model, X, strength=0.5)
    assert [group.producers for group in sparsity.groups] == [("other",)]
    reason = f"stem.{part} takes no gradient"
    assert sparsity.left_out["stem"] == sparsity.left_out["branch"] == reason


def test_groups_with_a_bias_of_two_layers_are_left_out():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)),
    )
    model[2].bias = model[0].bias
    sparsity = GroupSparsity(model, X, strength=0.5)
    assert [group.name for group in sparsity.groups] == ["4"]
    assert sparsity.left_out["0"] == "another layer has 0.bias too"
    assert sparsity.left_out["2"] == "another layer has 2.bias too"
    sparsity.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    sparsity.end_epoch(0.1)


def test_weights_of_zeros_have_no_level():
    model = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    low_rank = LowRank(model, target_params=0.9, schedule=[0.1])
    low_rank.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    low_rank.end_epoch(0.1)
    assert low_rank.statistics()["strength"] == 0


def test_convolutions_without_a_gradient_are_told():
    with pytest.raises(ValueError, match="whose weight takes a gradient, got none"):
        OrthoReg(nn.Conv2d(3, 4, 3).requires_grad_(False))
