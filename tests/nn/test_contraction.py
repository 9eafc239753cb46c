"""The algebra of linear convolutions, against running them one after the other."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyeff.nn import Kernel, compose, compose_all, compose_linear
from pyeff.nn.contraction import (
    add_parallel,
    centre_taps,
    composition_macs,
    identity_kernel,
    scale_outputs,
)


def kernel(outputs, inputs, taps, stride=1, dilation=1, groups=1, bias=True):
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (taps, stride, dilation)]
    weight = torch.randn(outputs, inputs // groups, *pairs[0], dtype=torch.float64)
    shift = torch.randn(outputs, dtype=torch.float64) if bias else None
    return Kernel(weight, shift, pairs[1], pairs[2], groups)


def run(x, k, padding=0):
    return F.conv2d(x, k.weight, k.bias, k.stride, padding, k.dilation, k.groups)


def images(channels=4, size=(23, 25)):
    return torch.randn(2, channels, *size, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


TAPS = [1, 3, (3, 1), (2, 4)]


@pytest.mark.parametrize(("first", "second"), list(product(TAPS, TAPS)), ids=str)
def test_two_stacked_are_one(first, second):
    x = images(size=(50, 53))
    for strides, dilations in product([(1, 1), (2, 1), (1, 2), (4, 2)], [(1, 1), (2, 2), (1, 3)]):
        a = kernel(6, 4, first, strides[0], dilations[0])
        b = kernel(5, 6, second, strides[1], dilations[1])
        assert_same(run(x, compose(a, b), 3), run(run(x, a, 3), b))


@pytest.mark.parametrize("dilations", [((2, 1), (3, 2)), ((4, 6), (6, 4)), ((1, 2), (5, 1))])
def test_dilations_that_do_not_divide_each_other(dilations):
    a, b = kernel(6, 4, 3, (1, 2), dilations[0]), kernel(5, 6, 3, 1, dilations[1])
    x = images(size=(40, 60))
    assert_same(run(x, compose(a, b)), run(run(x, a), b))


def test_a_common_dilation_stays_one():
    composed = compose(kernel(6, 4, 3, dilation=3), kernel(5, 6, 5, dilation=3))
    assert composed.taps == (7, 7)
    assert composed.dilation == (3, 3)
    pointwise = compose(kernel(6, 4, 1, dilation=7), kernel(5, 6, 5, dilation=3))
    assert pointwise.taps == (5, 5)
    assert pointwise.dilation == (3, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("biases", list(product([False, True], repeat=2)))
def test_groups_and_biases(groups, biases):
    a = kernel(8, 4, 3, 2, groups=groups, bias=biases[0])
    b = kernel(12, 8, 3, groups=groups, bias=biases[1])
    composed = compose(a, b)
    assert composed.groups == groups
    assert (composed.bias is not None) == any(biases)
    x = images()
    assert_same(run(x, composed), run(run(x, a), b))


def test_is_the_sum_that_the_docstring_writes():
    a, b = kernel(3, 2, (2, 3), (2, 1)), kernel(2, 3, (3, 2))
    composed = compose(a, b)
    expected = torch.zeros(2, 2, 6, 4, dtype=torch.float64)
    for o, i, p, y, x, u, v in product(*(range(n) for n in (2, 2, 3, 3, 2, 2, 3))):
        expected[o, i, 2 * y + u, x + v] += b.weight[o, p, y, x] * a.weight[p, i, u, v]
    assert_same(composed.weight, expected)
    assert_same(composed.bias, b.bias + b.weight.sum((2, 3)) @ a.bias)


def test_with_stride_1_is_a_transposed_convolution():
    a, b = kernel(6, 4, 3, bias=False), kernel(5, 6, 5, bias=False)
    assert_same(compose(a, b).weight, F.conv_transpose2d(b.weight, a.weight))


def test_gradients_twice():
    a, b = kernel(4, 2, 2, groups=2), kernel(2, 4, (2, 1), groups=2)
    tensors = [t.requires_grad_() for t in (a.weight, a.bias, b.weight, b.bias)]

    def composed(w1, b1, w2, b2):
        result = compose(Kernel(w1, b1, groups=2), Kernel(w2, b2, groups=2))
        return result.weight, result.bias

    assert torch.autograd.gradcheck(composed, tensors)
    assert torch.autograd.gradgradcheck(composed, tensors)


@pytest.mark.parametrize("channels", [(2, 8, 16, 16, 3), (3, 16, 16, 8, 2)])
def test_chains(channels):
    kernels = [kernel(o, i, 3) for i, o in pairwise(channels)]
    x = images(channels[0])
    y = x
    for member in kernels:
        y = run(y, member)
    composed = compose_all(kernels)
    assert composed.taps == (9, 9)
    assert_same(run(x, composed), y)
    # From the end with the fewer channels: taps of both, channels of all three.
    n, (a, b, c, d, e) = 9, channels
    macs = n * n * a * b * c + 25 * n * a * c * d + 49 * n * a * d * e
    from_end = n * n * c * d * e + n * 25 * b * c * e + n * 49 * a * b * e
    shapes = [k.shape for k in kernels]
    assert composition_macs(shapes) == min(macs, from_end)
    with FlopCounterMode(display=False) as counted:
        compose_all([Kernel(k.weight) for k in kernels])
    assert counted.get_total_flops() == 2 * min(macs, from_end), "the cheaper end is taken"
    assert compose_all(kernels[:1]) is kernels[0]
    assert composition_macs(shapes[:1]) == 0


def test_a_chain_of_1x1_kxk_1x1_is_the_papers_sum():
    a, b, c = kernel(8, 3, 1), kernel(12, 8, (3, 5)), kernel(4, 12, 1)
    composed = compose_all([a, b, c])
    weights = (c.weight[:, :, 0, 0], b.weight, a.weight[:, :, 0, 0])
    assert_same(composed.weight, torch.einsum("oq,qpyx,pi->oiyx", *weights))
    inner = b.bias + b.weight.sum((2, 3)) @ a.bias
    assert_same(composed.bias, c.bias + c.weight[:, :, 0, 0] @ inner)


def test_depth_wise_chain_is_the_digests_sum():
    c, r = 3, 4
    members = [kernel(c * r, c, 1, groups=c), kernel(c * r, c * r, 3, groups=c)]
    members.append(kernel(c, c * r, 1, groups=c))
    composed = compose_all(members)
    w1, w3 = members[0].weight.reshape(c, r), members[2].weight.reshape(c, r)
    w2 = members[1].weight.reshape(c, r, r, 3, 3)
    assert_same(composed.weight[:, 0], torch.einsum("cq,cqpyx,cp->cyx", w3, w2, w1))
    b1, b2 = (m.bias.reshape(c, r) for m in members[:2])
    inner = b2 + torch.einsum("cqpyx,cp->cq", w2, b1)
    assert_same(composed.bias, members[2].bias + (w3 * inner).sum(1))


@pytest.mark.parametrize("biases", list(product([False, True], repeat=2)))
def test_linear(biases):
    first, second = nn.Linear(5, 7, biases[0]).double(), nn.Linear(7, 3, biases[1]).double()
    weight, bias = compose_linear((first.weight, first.bias), (second.weight, second.bias))
    assert (bias is not None) == any(biases)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_same(F.linear(x, weight, bias), second(first(x)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_parallel_branches_are_one(groups, stride):
    options = {"stride": stride, "groups": groups}
    whole = kernel(4, 4, 3, dilation=2, **options)
    branches = [whole, kernel(4, 4, 1, **options), kernel(4, 4, (1, 3), dilation=2, **options)]
    branches += [kernel(4, 4, (3, 1), dilation=(2, 5), bias=False, **options)]
    branches += [identity_kernel(whole, 4)]
    x = images()
    added = add_parallel(branches)
    paddings = [2, 0, (0, 2), (2, 0), 0]
    y = sum(run(x, k, p) for k, p in zip(branches, paddings, strict=True))
    assert added.taps == (3, 3)
    assert_same(run(x, added, 2), y)
    alone = run(x, identity_kernel(whole, 4))
    assert torch.equal(alone, x[:, :, ::stride, ::stride])


def test_a_norm_is_a_scale_and_a_shift():
    conv, norm = nn.Conv2d(4, 6, 3).double(), nn.BatchNorm2d(6).double().eval()
    scale, shift = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
        norm.eps = 0.0
    x = images()
    assert_same(run(x, scale_outputs(Kernel.of(conv), scale, shift)), norm(conv(x)))
    conv.bias = None
    assert_same(run(x, scale_outputs(Kernel.of(conv), scale, shift)), norm(conv(x)))


def test_kernels_of_layers():
    conv = nn.Conv2d(4, 6, (3, 5), (1, 2), dilation=(2, 1), groups=2)
    own = Kernel.of(conv)
    assert own.weight is conv.weight
    assert (own.stride, own.dilation, own.groups) == ((1, 2), (2, 1), 2)
    wide = Kernel.of(conv, torch.float64)
    assert wide.weight.dtype == wide.bias.dtype == torch.float64
    assert wide.to(torch.float32).weight.dtype == torch.float32
    conv.bias = None
    assert Kernel.of(conv, torch.float64).bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: compose(kernel(4, 4, 3, groups=2), kernel(4, 4, 3)),
            "compose: second must have the groups of the first, 2, got 1",
        ),
        (
            lambda: compose(kernel(6, 4, 3), kernel(4, 4, 3)),
            "compose: second must take the 6 channels of the first, got 4",
        ),
        (lambda: compose_all([]), "compose_all: kernels must be one at least, got none"),
        (
            lambda: compose_linear((torch.ones(3, 2), None), (torch.ones(2, 2), None)),
            "compose_linear: second must take the 3 features of the first, got 2",
        ),
        (lambda: add_parallel([]), "add_parallel: kernels must be one at least, got none"),
        (
            lambda: add_parallel([kernel(4, 4, 3), kernel(4, 4, 3, groups=2)]),
            "add_parallel: kernels must have the same groups, got 1 and 2",
        ),
        (
            lambda: add_parallel([kernel(4, 4, 3), kernel(4, 4, 3, 2)]),
            r"add_parallel: kernels must have the same stride, got \(1, 1\) and \(2, 2\)",
        ),
        (
            lambda: add_parallel([kernel(4, 4, 3), kernel(6, 4, 3)]),
            r"add_parallel: kernels must have the same channels, got \(4, 4\) and \(6, 4\)",
        ),
        (
            lambda: add_parallel([kernel(4, 4, 3), kernel(4, 4, 3, dilation=2)]),
            r"add_parallel: kernels must have the same dilation, got \[1, 2\]",
        ),
        (
            lambda: add_parallel([kernel(4, 4, 3), kernel(4, 4, 2)]),
            r"centre_taps: taps must exceed \(2, 2\) by even numbers, got \(3, 3\)",
        ),
        (
            lambda: centre_taps(kernel(4, 4, 3), (1, 3)),
            r"centre_taps: taps must exceed \(3, 3\) by even numbers, got \(1, 3\)",
        ),
        (
            lambda: identity_kernel(kernel(4, 4, 3, groups=2), 3),
            "identity_kernel: channels must be a multiple of the 2 groups, got 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
