import sys

import pytest
import torch
import torch.nn.functional as F
from compress.sparse_nets import NETS, Residual, Sequence1d, Shuffled, image, settled
from torch import nn

from pyeff.compress import ParameterCount, channel_groups, map_channels
from pyeff.models import build
from pyeff.nn import Downsampler, FactorizedConv2d, NonBottleneck1d

pytest.importorskip("torch_pruning")


def by_name(groups):
    return {group.name: group for group in groups}


@pytest.mark.parametrize("name", NETS)
def test_nothing_but_its_consumers_reads_a_group(name):
    """With a third of all groups dead, their columns may be anything."""
    net = settled(NETS[name]())
    groups = channel_groups(net, image(), include_norm=True)
    assert groups
    chosen = {group: torch.arange(group.channels) % 3 == 0 for group in groups}
    for group, dead in chosen.items():
        group.clear(net, dead)
        assert torch.equal(group.dead(net), dead)
    expected = net(image())
    for group, dead in chosen.items():
        for member in group.members:
            if member.role == "consumer":
                scramble(net.get_submodule(member.name), member.index[dead].flatten())
    assert torch.equal(net(image()), expected)


@torch.no_grad()
def scramble(module, channels):
    weight = module.weight
    if getattr(module, "groups", 1) > 1:
        return  # its filters are dead with its inputs
    if getattr(module, "transposed", False):
        weight[channels] = 1e3
    else:
        weight[:, channels] = 1e3


@pytest.mark.parametrize("name", NETS)
def test_a_dead_channel_of_a_grouped_layer_is_a_whole_group(name):
    net = NETS[name]()
    for group in channel_groups(net, image()):
        for member in group.members:
            layer = net.get_submodule(member.name)
            many = getattr(layer, "groups", 1)
            if many > 1:
                side = layer.in_channels if member.role == "consumer" else layer.out_channels
                expected = torch.arange(side).view(many, -1)
                assert torch.equal(member.index.sort(0).values, expected)


def test_sums_tie_all_who_are_added():
    groups = by_name(channel_groups(Residual(), image()))
    assert set(groups) == {"stem", "inner"}
    assert groups["stem"].producers == ("stem", "outer", "side")
    assert groups["stem"].consumers == ("inner", "head")
    assert groups["inner"].producers == ("inner",)
    assert groups["stem"].size == (27 + 1) + (108 + 1) + (3 + 1)


def test_a_concatenation_shifts_the_channels_of_its_parts():
    groups = by_name(channel_groups(NETS["Concat"](), image(), include_norm=True))
    assert set(groups) == {"left", "right"}
    inputs = {
        (name, member.name): member.index.flatten().tolist()
        for name, group in groups.items()
        for member in group.members
        if member.role in ("consumer", "norm")
    }
    assert inputs["right", "head"] == inputs["right", "norm"] == list(range(3, 14))
    assert inputs["left", "head"] == inputs["left", "norm"] == list(range(14, 23))
    assert inputs["left", "more"] == list(range(9))
    assert groups["right"].producers == ("right", "more")


def test_a_flattened_map_belongs_to_its_channel():
    groups = by_name(channel_groups(NETS["Plain"](), image()))
    assert {name: group.channels for name, group in groups.items()} == {
        "conv1": 12,
        "conv2": 10,
        "hidden": 14,
    }
    linear = next(m for m in groups["conv2"].members if m.name == "hidden")
    assert torch.equal(linear.index, torch.arange(160).view(10, 16))
    assert groups["conv2"].norms == ("norm2",)


def test_depthwise_convolutions_live_with_their_inputs():
    groups = by_name(channel_groups(NETS["Separable"](), image()))
    assert groups["expand"].producers == ("expand", "depth", "excite")
    assert groups["project"].producers == ("project", "twice")
    assert groups["project"].channels == 10
    twice = next(m for m in groups["project"].members if m.role == "consumer" and m.name == "head")
    assert torch.equal(twice.index, torch.arange(20).view(10, 2))


def test_a_grouped_convolution_makes_a_channel_of_each_of_its_groups():
    groups = by_name(channel_groups(NETS["Grouped"](), image()))
    assert {name: group.channels for name, group in groups.items()} == {"stem": 6, "up": 4}
    assert groups["stem"].producers == ("stem", "grouped")
    assert groups["up"].producers == ("up", "up_grouped")
    assert [m.role for m in groups["stem"].members if m.name == "scale"] == ["scale"]


def test_a_shuffle_is_noticed_and_leaves_the_rest():
    found = map_channels(Shuffled(), image())
    assert [group.name for group in found.groups] == ["inner"]
    assert "in a way that is not known" in found.left_out["stem"]


def test_sequences_and_instance_norms():
    found = map_channels(Sequence1d(), torch.randn(2, 3, 7), include_norm=True)
    groups = by_name(found.groups)
    assert {name: group.channels for name, group in groups.items()} == {"conv": 10, "linear": 9}
    assert groups["conv"].size == 9 + 1 + 2


class OverInput(nn.Module):
    """A sum with the image itself, and a norm over channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.next = nn.Conv2d(3, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.free = nn.Conv2d(8, 9, 1)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        x = self.norm(self.next(x + self.conv(x)))
        return F.log_softmax(self.head(F.relu(self.free(x))), 1)


def test_channels_may_lie_on_the_last_axis():
    net = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 3))
    for shape in ((2, 6), (2, 5, 6), (2, 5, 4, 6)):
        assert [(g.name, g.channels) for g in channel_groups(net, torch.randn(shape))] == [
            ("0", 20)
        ]


def test_what_cannot_be_removed_is_left_out_with_its_reason():
    found = map_channels(OverInput(), image())
    assert [group.name for group in found.groups] == ["free"]
    assert found.left_out == {
        "conv": "tied to the network's input",
        "next": "tied to norm",
        "head": "tied to the network's output",
    }


def test_shared_and_computed_weights_are_left_out():
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 1)),
        nn.Conv2d(5, 2, 1),
    )
    net[1].weight = net[0].weight
    found = map_channels(net, image())
    assert [group.name for group in found.groups] == ["2"]
    assert found.left_out["1"] == "it shares its weight with 0"
    assert found.left_out["0"] == "it shares its weight with 1"
    assert "computed from other parameters" in found.left_out["3"]


class Halves(nn.Module):
    """The halves of one layer go different ways."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.beside = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)
        self.other = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first, second = self.stem(x).chunk(2, 1)
        return self.head(first + self.beside(x)) + self.other(second)


def test_channels_of_one_layer_may_be_in_two_groups():
    groups = channel_groups(Halves(), image())
    assert [(group.name, group.channels) for group in groups] == [("stem", 8), ("stem#2", 8)]
    assert groups[0].producers == ("stem", "beside")
    assert groups[1].producers == ("stem",)
    assert groups[1].members[0].index.flatten().tolist() == list(range(8, 16))


def test_frozen_layers_and_training_modes_are_left_as_they_are():
    net = Residual().requires_grad_(False).train()
    net.inner.eval()
    net.beside = nn.ReLU(inplace=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert len(channel_groups(net, image())) == 2
    assert net.training
    assert net.stem.training
    assert not net.inner.training
    assert net.beside.inplace
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    net = Residual()
    torch.manual_seed(3)
    channel_groups(net, image())
    assert torch.equal(torch.rand(1), expected)


def test_fused_layers_of_ours_are_seen_through():
    net = settled(
        nn.Sequential(
            Downsampler(3, 16),
            NonBottleneck1d(16, dropout=0.3),
            FactorizedConv2d(16, 12, 3, rank=10, padding="same", norm="both"),
            nn.Conv2d(12, 2, 1),
        )
    )
    groups = by_name(channel_groups(net, image(), include_norm=True))
    assert groups["1.conv1.first"].channels == 16
    assert groups["2.first"].channels == 10
    assert groups["2.second"].consumers == ("3",)
    # The pooled image is tied to the residual stream's first channels, not to the others.
    assert groups["0.conv"].channels == 13
    assert groups["0.conv"].producers == ("0.conv", "1.conv2.second")


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"family": "decomposeme", "width": (8,) * 8, "classes": 5, "pools": (1, 2)}, {"head"}),
        ({"family": "backbone", "name": "resnet8", "classes": 5}, None),
    ],
)
def test_networks_of_ours(config, left):
    net = build(config)
    found = map_channels(net, torch.randn(1, 3, 16, 16))
    inner = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(found.groups) >= 3
    made = {name for group in found.groups for name in group.producers}
    assert made | set(found.left_out) >= set(inner)
    if left is not None:
        assert set(found.left_out) == left


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("include_norm", [False, True])
def test_what_is_gathered_is_written_back(name, include_norm):
    net = NETS[name]()
    groups = channel_groups(net, image(), include_norm=include_norm)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    versions = {n: p._version for n, p in net.named_parameters()}
    for group in groups:
        matrix = group.gather(net)
        assert matrix.shape == (group.channels, group.size)
        group.write(net, matrix * 2)
        torch.testing.assert_close(group.gather(net), matrix * 2, rtol=0, atol=0)
    doubled = {n for group in groups for n in group.parameters}
    for n, parameter in net.named_parameters():
        ratio = torch.full_like(parameter, 2 if n in doubled else 1)
        if name == "Concat" and n.startswith("norm") and include_norm:
            ratio[:3] = 1  # the image's
        assert torch.equal(parameter, before[n] * ratio), n
        assert (parameter._version > versions[n]) == (n in doubled)


def test_rows_of_a_grouped_transposed_convolution_are_its_filters():
    net = NETS["Grouped"]()
    up = by_name(channel_groups(net, image()))["up"]
    with torch.no_grad():
        net.up_grouped.weight.zero_()
        net.up.weight.zero_()
        net.up.bias.zero_()
        net.up_grouped.weight[3:6, :] = 1  # inputs 3..5 make outputs 2 and 3: group 1
    assert up.dead(net).tolist() == [True, False, True, True]


@pytest.mark.parametrize("name", NETS)
def test_counted_parameters_are_those_that_cutting_leaves(name):
    net = NETS[name]()
    groups = channel_groups(net, image())
    count = ParameterCount(net, groups)
    assert count.after() == count.total == sum(p.numel() for p in net.parameters())
    alive = [torch.arange(group.channels) >= 2 for group in groups]
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    for group, stays in zip(groups, alive, strict=True):
        for member in group.members:
            cut_mask(net.get_submodule(member.name), member, ~stays, mask)
    assert count.after(alive) == sum(int(kept.sum()) for kept in mask.values())


def cut_mask(module, member, gone, mask):
    """Marks what a member loses, in the parameters' own shapes."""
    channels = member.index[gone].flatten()
    for name, _ in module.named_parameters():
        kept = mask[f"{member.name}.{name}"]
        groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
        if name == "weight" and transposed and member.role == "producer" and groups == 1:
            kept[:, channels] = False
        elif name == "weight" and transposed and groups > 1:
            if member.role == "consumer":
                kept[channels] = False
        elif member.role != "consumer":
            kept[channels] = False
        elif name == "weight" and groups == 1:
            (kept.transpose(0, 1) if not transposed else kept)[channels] = False


def test_counted_ranks():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 5))
    count = ParameterCount(net)
    assert count.after(ranks={"0": 2}) == 2 * (6 + 36) + 6 + 30 + 5
    assert count.after(ranks={"0": 6, "1": 1}) == 6 * 36 + 6 + (6 + 5) + 5


class NoGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x).detach()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: channel_groups(Residual(), "x"), TypeError, "example must be a tensor or a seq"),
        (lambda: channel_groups(Residual(), [1]), TypeError, "example must be a tensor or a seq"),
        (
            lambda: channel_groups(Residual(), torch.randn(1, 4, 8, 8)),
            ValueError,
            "model must be one that can be traced with the example, got RuntimeError",
        ),
        (lambda: channel_groups(NoGraph(), image()), ValueError, "channel_groups: model must"),
    ],
)
def test_bad_input_is_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_matrices_and_missing_tensors_are_told():
    net = Residual()
    group = channel_groups(net, image())[0]
    with pytest.raises(ValueError, match=r"ChannelGroup: matrix must be \[10, 141\], got \[2, 3\]"):
        group.write(net, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"tensors must hold stem.weight, got none"):
        group.gather({})


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install pyeff\[compress\]"):
        channel_groups(Residual(), image())
