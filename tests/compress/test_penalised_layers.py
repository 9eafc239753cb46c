"""Which layers the penalties act on: those that can be made smaller, and that are trained."""

import copy

import pytest
import torch
from torch import nn

from pyeff.compress import Compressor, GroupSparsity, LowRank, OrthoReg, factorize

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
    compressor = Compressor(model, X, rank=LowRank(model, strength=0.5))
    compressor.attach(optimizer)
    model(X).square().mean().backward()
    optimizer.step()
    compressor.end_epoch(1e-3)


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
