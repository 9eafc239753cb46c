"""Expanded layers that start with the function of a trained compact one."""

import pytest
import torch
from torch import nn

from pyeff.nn import ExpandedConv2d, ExpandedLinear


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def images(channels=4):
    return torch.randn(2, channels, 19, 17, dtype=torch.float64)


def usual(member):
    """How large its weights are in a fresh layer of its size."""
    window = (member.kernel_size, member.stride, 0, 1, member.groups)
    fresh = nn.Conv2d(member.in_channels, member.out_channels, *window)
    return fresh.weight.std()


CASES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": (2, 5), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 5, "padding": 4, "stride": 2, "dilation": 2, "mode": "ck"},
    {"kernel_size": 7, "padding": 3, "groups": 2, "mode": "ck"},
    {"kernel_size": 7, "padding": 3, "groups": 4, "mode": "ck", "bias": False},
    {"kernel_size": (5, 3), "mode": "ck"},
    {"kernel_size": (1, 7), "padding": "same", "mode": "ck"},
    {"kernel_size": 9, "padding": 4, "mode": "ck", "padding_mode": "circular"},
    {"kernel_size": 11, "mode": "ck"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("inner_bias", [True, False])
def test_computes_the_same(options, inner_bias):
    options = dict(options)
    mode = options.pop("mode", "cl")
    conv = nn.Conv2d(4, 8, **options, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    layer = ExpandedConv2d.from_compact(conv, mode=mode, inner_bias=inner_bias)
    assert layer.mode == mode
    x = images()
    for form in ("expanded", "contracted"):
        layer.form = form
        assert_same(layer(x), conv(x))
    for name, tensor in conv.state_dict().items():
        assert torch.equal(tensor, before[name])
    contracted = layer.contract()
    assert repr(contracted) == repr(conv)
    assert_same(contracted.weight, conv.weight)
    if conv.bias is not None:
        assert [m.bias is not None for m in layer.members][:-1] == [inner_bias] * len(layer.widths)
        assert_same(contracted.bias, conv.bias)


@pytest.mark.parametrize("channels", [(4, 8), (8, 4), (6, 6), (1, 1)])
@pytest.mark.parametrize("kernel", [5, 7, 9])
def test_rate_4_suffices_for_ck(channels, kernel):
    conv = nn.Conv2d(*channels, kernel, dtype=torch.float64)
    layer = ExpandedConv2d.from_compact(conv)
    assert layer.mode == "ck"
    x = images(channels[0])
    assert_same(layer(x), conv(x))


@pytest.mark.parametrize(("mode", "kernel"), [("cl", 3), ("ck", 7)])
def test_every_weight_can_be_trained(mode, kernel):
    """No zeros, no weights of another size than usual, gradients beyond the compact function's."""
    conv = nn.Conv2d(4, 8, kernel, dtype=torch.float64)
    layer = ExpandedConv2d.from_compact(conv, mode=mode)
    layer(images()).square().sum().backward()
    for member in layer.members:
        assert 0.3 < member.weight.std() / usual(member) < 5
        assert member.weight.count_nonzero() > 0.99 * member.weight.numel()
        assert member.weight.grad.count_nonzero() == member.weight.numel()


@pytest.mark.parametrize(("kernel", "channels"), [(3, 16), (5, 16), (7, 16)])
def test_noise_is_what_the_function_does_not_see(kernel, channels):
    conv, x = nn.Conv2d(4, 8, kernel, dtype=torch.float64), images()
    norms = []
    for noise in (0.0, 1.0, 5.0):
        torch.manual_seed(5)
        layer = ExpandedConv2d.from_compact(conv, noise=noise)
        assert layer.widths[0] == channels
        assert_same(layer(x), conv(x))
        norms.append([float(member.weight.detach().norm()) for member in layer.members])
    assert all(a <= b * (1 + 1e-9) for a, b in zip(norms[0], norms[1], strict=True))
    assert sum(norms[0]) < sum(norms[1]) < sum(norms[2])


def test_without_noise_most_of_the_expansion_is_unused():
    conv = nn.Conv2d(4, 8, 3, dtype=torch.float64)
    ranks = []
    for noise in (0.0, 1.0):
        weight = ExpandedConv2d.from_compact(conv, noise=noise).members[1].weight
        by_input = weight.detach().transpose(0, 1).flatten(1)
        ranks.append(int(torch.linalg.matrix_rank(by_input, rtol=1e-9)))
    assert ranks == [4, 16]


def test_few_channels_suffice_for_a_weight_of_low_rank():
    conv = nn.Conv2d(6, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("or,rsyx,si->oiyx", *low_rank(8, 3, 2, 6)))
    layer = ExpandedConv2d.from_compact(conv, widths=(2, 3))
    x = images(6)
    assert_same(layer(x), conv(x))
    with pytest.raises(ValueError, match=r"widths must be at least \(2, 3\) for .*\(2, 2\)"):
        ExpandedConv2d.from_compact(conv, widths=(2, 2))
    with torch.no_grad():
        conv.weight.zero_()
    assert_same(ExpandedConv2d.from_compact(conv, widths=(1, 1))(x), conv(x))


def low_rank(outputs, rank_out, rank_in, inputs):
    shapes = (outputs, rank_out), (rank_out, rank_in, 3, 3), (rank_in, inputs)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_keeps_dtype_and_flags():
    conv = nn.Conv2d(4, 8, 5, padding=2).eval().requires_grad_(False)
    layer = ExpandedConv2d.from_compact(conv, form="expanded")
    assert layer.form == "expanded"
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    x = images().float()
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    assert all(
        p.requires_grad for p in ExpandedConv2d.from_compact(nn.Conv2d(4, 8, 3)).parameters()
    )


def test_says_which_channels_would_suffice():
    conv = nn.Conv2d(3, 8, 7, dtype=torch.float64)
    message = r"ExpandedConv2d: widths must be larger, \(9, 24\) for example, .*, got \(3, 32\)"
    with pytest.raises(ValueError, match=message):
        ExpandedConv2d.from_compact(conv, widths=(3, 32))
    layer = ExpandedConv2d.from_compact(conv, widths=(9, 24))
    x = images(3)
    assert_same(layer(x), conv(x))
    conv = nn.Conv2d(6, 4, 11, groups=2, dtype=torch.float64)
    message = r"widths must be larger, \((\d+), (\d+), (\d+), (\d+)\) for example"
    with pytest.raises(ValueError, match=message) as error:
        ExpandedConv2d.from_compact(conv, rate=1)
    text = str(error.value)
    widths = tuple(map(int, text[text.index("(") + 1 : text.index(")")].split(",")))
    layer = ExpandedConv2d.from_compact(conv, widths=widths)
    x = images(6)
    assert_same(layer(x), conv(x))
    message = r"ExpandedConv2d: widths must be at least \(3, 8\) for an expanded"
    with pytest.raises(ValueError, match=message):
        ExpandedConv2d.from_compact(nn.Conv2d(3, 8, 3), widths=(2, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner_bias", [True, False])
def test_linear(bias, inner_bias):
    linear = nn.Linear(6, 5, bias, dtype=torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    for options in ({}, {"widths": (5, 5)}, {"rate": 1}, {"noise": 0.0}):
        layer = ExpandedLinear.from_compact(linear, inner_bias=inner_bias, **options)
        for form in ("expanded", "contracted"):
            layer.form = form
            assert_same(layer(x), linear(x))
    with pytest.raises(ValueError, match=r"ExpandedLinear: widths must be at least \(5, 5\) for"):
        ExpandedLinear.from_compact(linear, widths=(5, 4))


def test_refuses_other_layers():
    with pytest.raises(TypeError, match=r"ExpandedConv2d: conv must be an nn\.Conv2d, got Linear"):
        ExpandedConv2d.from_compact(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"ExpandedLinear: linear must be an nn\.Linear, got Conv2"):
        ExpandedLinear.from_compact(nn.Conv2d(2, 2, 1))
