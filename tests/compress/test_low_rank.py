import copy
import json

import pytest
import torch
from compress.sparsity_training import SCHEDULE, SmallNet, make_optimizer, train
from torch import nn

from pyeff.compress import LowRank, ParameterCount, shrink_singular_values


def attached(net, kind="sgd", **options):
    optimizer = make_optimizer(kind, net)
    low_rank = LowRank(net, **options)
    low_rank.attach(optimizer)
    return low_rank, optimizer


def matrices(net):
    return {
        name: module.weight.detach().flatten(1).clone()
        for name, module in net.named_children()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize("route", ["svd", "gram", "auto"])
def test_an_application_lowers_all_singular_values(route):
    net = SmallNet()
    low_rank, _ = attached(net, strength=4.0, layers={"conv1": 0.0, "conv2": 0.5}, route=route)
    assert low_rank.layers == ("conv2", "conv3", "head")
    before = matrices(net)
    biases = net.conv3.bias.detach().clone()
    low_rank.end_epoch(lr=0.1)
    after = matrices(net)
    for name, tau in (("conv2", 0.2), ("conv3", 0.4), ("head", 0.4)):
        expected = shrink_singular_values(before[name].double(), tau, route="svd").float()
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)
        values = torch.linalg.svdvals(before[name].double())
        assert low_rank.statistics()["ranks"][name] == int((values > tau).sum())
    assert torch.equal(after["conv1"], before["conv1"])
    assert torch.equal(net.conv3.bias, biases)
    assert net.conv3.weight._version > 0


def test_steps_add_up_to_an_epoch():
    nets = [SmallNet(), SmallNet()]
    once, _ = attached(nets[0], strength=2.0)
    often, _ = attached(nets[1], strength=2.0, every=4, steps_per_epoch=10)
    once.end_epoch(lr=0.1)
    for _ in range(10):
        often.after_step(lr=0.1)
    often.end_epoch(lr=0.1)
    for one, other in zip(*(matrices(net).values() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_adam_divides_by_the_mean_of_its_metric():
    net = SmallNet()
    low_rank, optimizer = attached(net, kind="adam", strength=0.02)
    train(net, optimizer, [], [0])
    before = matrices(net)
    state = optimizer.state[net.conv3.weight]
    metric = (state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8
    low_rank.end_epoch(lr=0.005)
    tau = 0.005 * 0.02 / float(metric.mean())
    expected = shrink_singular_values(before["conv3"].double(), tau, route="svd").float()
    torch.testing.assert_close(matrices(net)["conv3"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, before["conv3"])


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_training_ends_at_the_target(kind):
    net = SmallNet()
    scale = 0.05 if kind == "adam" else 1.0
    low_rank, optimizer = attached(
        net, kind=kind, target_params=0.5, schedule=[lr * scale for lr in SCHEDULE]
    )
    assert low_rank.statistics()["share"] == 1
    first = train(net, optimizer, [low_rank], [0], scale=scale)
    last = train(net, optimizer, [low_rank], range(1, 8), scale=scale)
    found = low_rank.statistics()
    # A rank of conv3 is 32 + 288 of 17,256 parameters, 1.9 %.
    assert 0.5 - 0.02 <= found["share"] <= 0.5
    assert found["params"] == ParameterCount(net).after(ranks=found["ranks"])
    assert last < 0.8 * first
    numerical = low_rank.ranks()
    assert all(numerical[name] == rank for name, rank in found["ranks"].items() if rank)
    energy = low_rank.ranks(0.9)
    assert all(energy[name] <= numerical[name] for name in energy)
    assert energy["conv3"] < numerical["conv3"]


@pytest.mark.parametrize("route", ["svd", "gram"])
def test_every_layer_keeps_its_floor(route):
    net = SmallNet()
    low_rank, _ = attached(net, strength=1e6, floor=2, route=route)
    before = matrices(net)
    low_rank.end_epoch(lr=0.1)
    after = matrices(net)
    assert set(low_rank.statistics()["ranks"].values()) == {2}
    for name, matrix in after.items():
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values[:2], torch.linalg.svdvals(before[name])[:2])
        assert float(values[2:].max()) < 1e-5 * float(values[0])


def test_a_small_target_leaves_no_layer_without_a_rank():
    net = SmallNet()
    low_rank, _ = attached(net, target_params=0.06, schedule=[0.1])
    low_rank.end_epoch(lr=0.1)
    found = low_rank.statistics()
    assert min(found["ranks"].values()) == 1
    assert found["share"] <= 0.06


def test_energy_is_a_share_of_the_sum():
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    low_rank = LowRank(net, strength=1.0)
    assert [low_rank.ranks(e)["0"] for e in (0.3, 0.45, 0.75, 0.95, 1.0)] == [1, 2, 3, 4, 4]


def test_transposed_convolutions_have_a_row_for_each_output():
    net = nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    low_rank, _ = attached(net, strength=3.0)
    assert low_rank.layers == ("0",)
    before = net[0].weight.detach().transpose(0, 1).flatten(1).clone()
    low_rank.end_epoch(lr=0.1)
    after = net[0].weight.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(after, shrink_singular_values(before, 0.3), rtol=1e-4, atol=1e-6)


def test_without_a_target_the_run_takes_half_a_median():
    net = SmallNet()
    low_rank, _ = attached(net, schedule=[0.1] * 4)
    before = torch.linalg.svdvals(matrices(net)["conv3"])
    for _ in range(4):
        low_rank.end_epoch(lr=0.1)
    after = torch.linalg.svdvals(matrices(net)["conv3"])
    torch.testing.assert_close(
        after, (before - 0.5 * before.median()).clamp_min(0), rtol=1e-3, atol=1e-4
    )


def test_resume_is_exact():
    options = {"kind": "momentum", "target_params": 0.5, "schedule": SCHEDULE}
    net = SmallNet()
    low_rank, optimizer = attached(net, **options)
    train(net, optimizer, [low_rank], range(3))
    other = SmallNet(seed=9)
    resumed, other_optimizer = attached(other, **options)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(json.loads(json.dumps(low_rank.state_dict())))
    for pair in ((net, optimizer, low_rank), (other, other_optimizer, resumed)):
        train(*pair[:2], [pair[2]], range(3, 5))
    assert resumed.statistics() == low_rank.statistics()
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LowRank(SmallNet()), ValueError, "schedule must have a learning rate above 0"),
        (lambda: LowRank(SmallNet(), strength=-1.0), ValueError, "strength must not be negative"),
        (lambda: LowRank(SmallNet(), strength=True), TypeError, 'strength must be a number or "a'),
        (
            lambda: LowRank(SmallNet(), strength=1.0, floor=0),
            ValueError,
            "floor must be a whole nu",
        ),
        (
            lambda: LowRank(SmallNet(), target_params=0.01, schedule=[0.1]),
            ValueError,
            r"target_params must be at least 0\.0\d+, which rank 1 of every layer and what",
        ),
        (lambda: LowRank(SmallNet(), strength=1.0, route="qr"), ValueError, "route must be one of"),
        (
            lambda: LowRank(SmallNet(), strength=1.0, layers={"norm2": 1.0}),
            ValueError,
            "layers must name layers that can be penalised, got 'norm2'",
        ),
        (
            lambda: LowRank(nn.Conv2d(4, 4, 3, groups=4), strength=1.0),
            ValueError,
            "model must have convolutions of one group or linear layers",
        ),
        (
            lambda: LowRank(SmallNet(), schedule=[0.1], target_params=0.0),
            ValueError,
            r"LowRank: target_params must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: LowRank(SmallNet(), strength=1.0).ranks(0.0),
            ValueError,
            r"energy must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: LowRank(SmallNet(), strength=1.0).load_state_dict({"initial": {}}),
            ValueError,
            "LowRank: state must be of the same layers",
        ),
    ],
)
def test_bad_input_is_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
