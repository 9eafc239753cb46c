"""Blocks of parallel branches equal the one convolution that they contract to."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms
from torch import nn

from pyeff.nn import ACBlock, DiverseBranchBlock, Reparam, RepVGGBlock, synchronise_batch_norm
from pyeff.nn.folding import layers_apart

BLOCKS = [RepVGGBlock, ACBlock, DiverseBranchBlock]
# Every branch has another border: no padding, half the kernel, more, and one axis without any.
CASES = {
    "half the kernel": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 3},
    "more than half": {"kernel_size": 3, "padding": 2},
    "5 x 5, less than half": {"kernel_size": 5, "padding": 1},
    "5 x 3, one axis": {"kernel_size": (5, 3), "padding": (3, 0)},
    "single tap, padded": {"kernel_size": 1, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven stride, no padding": {"kernel_size": 3, "stride": (1, 3)},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "dilation, less padding": {"kernel_size": 5, "padding": (1, 3), "dilation": (2, 1)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depth-wise, stride": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
    "same": {"kernel_size": 5, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular, groups": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2},
    "replicate, no padding": {"kernel_size": 3, "padding_mode": "replicate"},
}


def block(kind, channels=(4, 8), **options):
    """A float64 block in eval mode whose every number differs from its neutral value."""
    options.setdefault("kernel_size", 3)
    return randomise_norms(kind(*channels, **options).double()).eval()


def images(channels=4):
    return torch.randn(2, channels, 9, 10, dtype=torch.float64)


def assert_same(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels", [(4, 8), (4, 4)], ids=["wider", "identity"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_the_branches_equal_the_convolution_at_borders_too(kind, case, channels):
    layer, x = block(kind, channels, **CASES[case]), images()
    with layers_apart():
        by_branches = layer(x)
    conv = layer.contract()
    assert type(conv) is nn.Conv2d
    assert conv.bias is not None
    assert_same(conv(x), by_branches)
    assert_same(layer(x), by_branches)
    plain = nn.Conv2d(*channels, **CASES[case])
    assert str(conv) == str(plain)
    assert by_branches.shape == plain.double()(x).shape


def test_branches_are_what_the_papers_add_up():
    x = images()
    layer = block(RepVGGBlock, (4, 4), padding=1)
    assert list(layer.branches) == ["conv", "point", "identity"]
    named = layer.branches

    def normed(branch, y):
        return named[branch].norm(y)

    wanted = normed("conv", F.conv2d(x, named["conv"].conv.weight, padding=1))
    wanted = wanted + normed("point", F.conv2d(x, named["point"].conv.weight))
    with layers_apart():
        assert_same(layer(x), wanted + normed("identity", x))
    assert "identity" not in block(RepVGGBlock, (4, 4), stride=2).branches
    assert "identity" not in block(RepVGGBlock, (4, 8)).branches
    kernels = {n: tuple(b.conv.kernel_size) for n, b in block(ACBlock).branches.items()}
    assert kernels == {"conv": (3, 3), "column": (3, 1), "row": (1, 3)}
    diverse = block(DiverseBranchBlock, inner_channels=6).branches
    assert list(diverse) == ["conv", "point", "point_conv", "point_average"]
    assert diverse["point_conv"].conv.in_channels == 6


def test_the_first_point_convolution_of_a_diverse_block_starts_as_the_identity():
    x = torch.randn(1, 4, 3, 3)
    for groups in (1, 2):
        point = DiverseBranchBlock(4, 8, groups=groups).branches["point_conv"].point
        assert torch.equal(point(x), x)


def test_padding_the_middle_map_with_zeros_would_be_wrong():
    layer, x = block(DiverseBranchBlock, padding=1), images()
    branch = layer.branches["point_conv"]
    kernel = branch.folded()
    wanted = F.conv2d(x, kernel.weight, kernel.bias, padding=1)
    assert_same(branch(x), wanted)
    middle = branch.point_norm(branch.point(x))
    zeros = branch.norm(F.conv2d(middle, branch.conv.weight, padding=1))
    inside = (..., slice(1, -1), slice(1, -1))
    assert_same(zeros[inside], wanted[inside])
    assert (zeros - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BLOCKS)
def test_training_moves_the_statistics_and_every_parameter_has_a_gradient(kind):
    layer = kind(4, 4, padding=1)
    before = [norm.running_mean.clone() for norm in layer._norms()]
    layer(torch.randn(3, 4, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert all(
        not torch.equal(norm.running_mean, old)
        for norm, old in zip(layer._norms(), before, strict=True)
    )


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_in_eval_mode_are_those_of_the_branches(kind):
    layer, x = block(kind, (4, 4), padding=1, groups=2), images().requires_grad_()
    twin, x2 = copy.deepcopy((layer, x))
    layer(x).square().sum().backward()
    with layers_apart():
        twin(x2).square().sum().backward()
    assert_same(x.grad, x2.grad)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad, 1e-8)


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_the_kept_convolution_follows_the_tensors(kind):
    layer, x = block(kind, padding=1), images()
    before = layer(x)
    layer.branches["conv"].norm.running_mean.add_(1)
    assert (layer(x) - before).abs().max() > 1e-3
    assert_same(layer(x), layer.contract()(x))
    layer.float()
    assert layer(x.float()).dtype is torch.float32
    torch.testing.assert_close(layer(x.float()), layer.contract()(x.float()))
    layer.load_state_dict(block(kind, padding=1).state_dict())
    torch.testing.assert_close(layer(x.float()), layer.contract()(x.float()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_a_block_starts_from_a_convolution(kind, case):
    conv, x = nn.Conv2d(4, 4, **CASES[case]).double().eval(), images()
    layer = kind.from_compact(conv, norm_eps=1e-2)
    assert not layer.training
    assert_same(layer.contract().weight, conv.weight)
    with layers_apart():
        assert_same(layer(x), conv(x))
    without = nn.Conv2d(4, 4, bias=False, **CASES[case]).double()
    assert_same(kind.from_compact(without).contract()(x), without(x))


def test_dtype_mode_and_requires_grad_are_carried():
    conv = nn.Conv2d(4, 8, 3).to(torch.bfloat16).eval().requires_grad_(False)
    for layer in (RepVGGBlock.from_compact(conv), RepVGGBlock.like(conv)):
        made = layer.contract()
        assert made.weight.dtype is torch.bfloat16
        assert not made.training
        assert not any(p.requires_grad for p in [*layer.parameters(), *made.parameters()])
    made = RepVGGBlock(4, 8).contract()
    assert made.training
    assert made.weight.requires_grad


def test_statistics_are_folded_in_double_precision():
    """A float32 block contracts to the weights of its float64 copy, rounded once."""
    layer = randomise_norms(DiverseBranchBlock(4, 8, 5, padding=2))
    conv, precise = layer.contract(), copy.deepcopy(layer).double().contract()
    assert torch.equal(conv.weight, precise.weight.float())
    assert torch.equal(conv.bias, precise.bias.float())


def test_trains_compiled():
    layer, x = block(RepVGGBlock, padding=1).train(), images()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), layer(x))


def test_exports():
    layer, x = block(DiverseBranchBlock, padding=1), images()
    program = torch.export.export(layer, (images(),))
    assert_same(program.module()(x), layer(x))


def test_autocast_and_channels_last():
    layer = randomise_norms(ACBlock(4, 8, padding=1))
    x = images().float().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).shape == (2, 8, 9, 10)
        y = layer.eval()(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
    assert layer(x[:0]).shape == (0, 8, 9, 10)


def test_other_batch_norms_are_folded_as_well():
    layer, x = block(RepVGGBlock, (4, 4), padding=1), images()
    wanted = layer(x)
    assert_same(synchronise_batch_norm(copy.deepcopy(layer)).contract()(x), wanted)
    assert_same(nn.SyncBatchNorm.convert_sync_batchnorm(layer).contract()(x), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, since branches share its middle, got 4"),
        ({"kernel_size": (3, 2)}, "kernel_size must be odd"),
        ({"kernel_size": -1}, "kernel_size must be one or two ints of at least 1, got -1"),
        ({"stride": 0}, "stride must be one or two ints of at least 1, got 0"),
        ({"dilation": (1, 1, 1)}, "dilation must be one or two ints"),
        ({"padding": -1}, "padding must be one or two ints of at least 0, got -1"),
        ({"padding": "full"}, 'padding must be ints, "same" or "valid", got \'full\''),
        ({"padding": "same", "stride": 2}, 'stride must be 1 where padding is "same", got (2, 2)'),
        ({"padding_mode": "mirror"}, "padding_mode must be one of 'zeros', 'reflect'"),
        ({"groups": 3}, "must be positive multiples of groups, got 4 and 8 in 3 groups"),
        ({"groups": 0}, "must be positive multiples of groups"),
    ],
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_errors_are_in_words(kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        kind(4, 8, **options)
    assert str(error.value).startswith(f"{kind.__name__}: ")


def test_more_errors_in_words():
    with pytest.raises(ValueError, match="inner_channels must be a positive multiple of groups"):
        DiverseBranchBlock(4, 8, groups=2, inner_channels=3)
    with pytest.raises(TypeError, match=r"ACBlock: conv must be an nn.Conv2d, got Linear"):
        ACBlock.from_compact(nn.Linear(2, 2))
    layer = RepVGGBlock(4, 4)
    layer.branches["point"].norm.running_var[1] = float("nan")
    with pytest.raises(ValueError, match="RepVGGBlock: running statistics must be finite"):
        layer.contract()
    layer = RepVGGBlock(4, 4)
    layer.branches["point"].norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert layer.eval()(torch.randn(2, 4, 5, 5)).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="norms must have running statistics to be folded"):
        layer.contract()
    layer = RepVGGBlock(4, 4)
    layer.branches["conv"].conv = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 3))
    assert layer.eval()(torch.randn(2, 4, 5, 5)).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"branches must be convolutions .* got conv.conv"):
        layer.contract()
    with pytest.raises(NotImplementedError, match="_branches is what a subclass brings"):
        Reparam(4, 4)
