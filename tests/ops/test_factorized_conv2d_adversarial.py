"""factorized_conv2d where it could go wrong unseen: odd sizes, what is not finite, many callers."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from numerics import TOLERANCE
from ops.factorized_cases import ALL, Case
from ops.test_factorized_conv2d import DTYPES, ISAS, LAYOUTS, call, check

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.ops._factorized_choice import Form
from pyeff.ops._factorized_cpp import cpp_call
from pyeff.ops._factorized_cpp import forward as cpp_forward
from pyeff.ops._factorized_pair import FactorPair
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

LARGEST = 2**31 - 1
# One less, as many and one more than vectors, narrow panels and panels have.
CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65)
# Seeds of problems that are no other's.
SEEDS = range(7000, 7048)


def awkward_case(seed: int) -> Case:
    """A pair whose sizes lie at the borders of vectors, tiles, chains and images."""
    r = random.Random(seed)
    taps = r.choice([1, 3, 3, 3, 5, 11])
    size = r.choice([1, 2, 4, 5, 13, 14, 15, 29]), r.choice([1, 3, 4, 5, 14, 28, 31])
    dilation = r.choice([1, 1, 2, 4, max(size) - 1, max(size), max(size) + 1, 40])
    return Case(
        n=r.choice([1, 1, 2, 3]),
        channels=r.choice(CHANNELS),
        middle=r.choice(CHANNELS),
        outputs=r.choice(CHANNELS),
        size=size,
        taps=taps,
        vertical_first=r.random() < 0.5,
        stride=r.choice([1, 1, 1, 2, 3, 4, 17]),
        # At least as much as "same" has, so that any size is large enough; odd sides meet only so.
        padding=r.choice(["same", "same", max(1, dilation) * (taps // 2) + r.randint(0, 4)]),
        dilation=max(1, dilation),
        inner=r.choice([None, "relu", "relu6"]),
        outer=r.choice([None, "relu", "relu6", "silu", "hardswish"]),
        given=tuple(name for name in ALL if r.random() < 0.5),
    )


@pytest.mark.parametrize("isa", ISAS)
def test_awkward_problems_match_float64(isa):
    threads = torch.get_num_threads()
    try:
        with pyeff.isa(isa):
            for seed in SEEDS:
                case, dtype, layout = awkward_case(seed), DTYPES[seed % 4], LAYOUTS[seed % 5]
                torch.set_num_threads(1 + seed % 3)
                what = f"seed {seed}, {case}, {dtype}, {layout}"
                check(case, dtype, "cpu", "cpp", layout, what=what)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("vertical_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dilation_far_beyond_the_image_takes_no_memory(dtype, vertical_first):
    """Only the middle tap meets the image, whichever of them all the dilation is."""
    near = Case(2, 6, 16, 5, (5, 6), dilation=16, vertical_first=vertical_first, given=ALL)
    tensors = near.tensors(dtype)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    for backend in ("reference", "torch", "cpp"):
        results = []
        for case in (near, replace(near, dilation=LARGEST)):
            with pyeff.backend(backend):
                y = call(factorized_conv2d, tensors, case.options())
                results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for close, far in zip(*results, strict=True):
            torch.testing.assert_close(far, close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("beyond", [-2, 0, 3])
def test_the_kernels_themselves_take_any_dilation(beyond, taps, dtype):
    """The operator brings such taps nearer before it calls them."""
    case = Case(1, 6, 17, 5, (7, 6), taps)
    tensors = case.tensors(dtype)
    pairs = [
        FactorPair(1, d * (taps // 2) + beyond, d, "relu", None) for d in (16, LARGEST // taps)
    ]
    assert pairs[1].with_taps_near(tensors["x"].shape, taps).dilation == 7 + max(beyond, 0)
    for vertical_first in (True, False):
        if not vertical_first:
            tensors["w_first"], tensors["w_second"] = (
                tensors[name].mT for name in ("w_first", "w_second")
            )
        weights = tensors["w_first"], tensors["w_second"]
        near, far = (
            cpp_forward(
                cpp_call(tensors["x"], *weights, pair, Form("fused", False)), *tensors.values()
            )
            for pair in pairs
        )
        assert torch.equal(near, far)


def assert_same_kind(got, want, what):
    """NaN and infinities where float64 has them, and its numbers everywhere else."""
    rtol, atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=rtol,
        atol=4 * atol,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def far_beyond(case, dtype, bad):
    """Tensors with one bad number in x, and weights none of which is zero."""
    tensors = case.tensors(dtype)
    for name in ("w_first", "w_second"):
        weight = torch.randn(tensors[name].shape).sign() * torch.rand(tensors[name].shape).add(0.5)
        tensors[name] = weight.mul(0.25).to(dtype)
    tensors["x"][0, 1, 2, 3] = bad
    return tensors, {k: None if t is None else t.double() for k, t in tensors.items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_reaches_what_sees_it(bad, isa):
    """With odd channel counts too, whose vectors and pairs are filled up with zeros."""
    for channels, middle, outputs in ((5, 7, 3), (16, 16, 16), (6, 33, 17)):
        for vertical_first in (True, False):
            for dtype in DTYPES:
                case = Case(1, channels, middle, outputs, (6, 9), vertical_first=vertical_first)
                tensors, wide = far_beyond(case, dtype, bad)
                want = call(reference, wide, case.options())
                with pyeff.isa(isa), pyeff.backend("cpp"), pyeff.winograd(False):
                    got = call(factorized_conv2d, tensors, case.options())
                assert_same_kind(got, want, f"{channels}, {middle}, {outputs}, {dtype}")


def test_winograd_spreads_a_bad_number_no_further_than_its_four_outputs():
    case = Case(1, 64, 64, 64, (23, 37), dilation=2, inner=None)
    tensors, wide = far_beyond(case, torch.float32, float("nan"))
    tensors["x"][0, 1, 2, 3], wide["x"][0, 1, 2, 3] = 1.0, 1.0
    want = call(reference, wide, case.options())
    tensors["x"][0, 1, 11, 18] = float("nan")
    with pyeff.backend("cpp"):
        got = call(factorized_conv2d, tensors, case.options())
    bad = got.isnan()[0].any(0)
    assert bad[9:14:2, 16:21:2].all(), "the taps that see it"
    rows, cols = bad.nonzero().unbind(1)
    # Four outputs from six inputs: five times the dilation to either side at the most.
    assert rows.sub(11).abs().max() <= 10
    assert cols.sub(18).abs().max() <= 10
    good = ~bad.expand_as(got)
    torch.testing.assert_close(got.double()[good], want[good], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", ["relu", "relu6", "hardswish"])
def test_an_infinite_gradient_does_not_pass_a_closed_activation(inner, dtype):
    """The derivative there is zero, and not zero times infinity."""
    case = Case(1, 5, 19, 6, (5, 6), inner=inner)
    tensors = case.tensors(dtype)
    closed = torch.arange(19) % 2 == 0
    tensors["b_first"] = torch.where(closed, -40.0, 3.0).to(dtype)
    leaves = [tensors[name].requires_grad_() for name in ("w_first", "b_first")]
    for backend in ("reference", "torch", "cpp"):
        with pyeff.backend(backend):
            y = call(factorized_conv2d, tensors, case.options())
            grad_y = torch.ones_like(y)
            grad_y[0, 2, 1, 3] = float("inf")
            for grad in torch.autograd.grad(y, leaves, grad_y):
                assert (grad[closed] == 0).all(), backend
                assert not grad[~closed].isfinite().all(), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_no_bit(dtype):
    threads = torch.get_num_threads()
    cases = (
        Case(1, 32, 33, 48, (31, 41), outer="relu", given=ALL),
        Case(3, 17, 48, 32, (29, 38), dilation=3, vertical_first=False, given=ALL),
        Case(2, 48, 64, 31, (33, 27), 5, stride=2, given=ALL),
    )
    try:
        for case in cases:
            tensors = case.tensors(dtype)
            leaves = [t.requires_grad_() for t in tensors.values()]
            runs = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                with pyeff.backend("cpp"):
                    y = call(factorized_conv2d, tensors, case.options())
                    runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
            for other in runs[1:]:
                assert all(map(torch.equal, runs[0], other)), case
    finally:
        torch.set_num_threads(threads)


def test_callers_in_many_threads_do_not_disturb_each_other():
    """Kernels run without the interpreter's lock; what they remember is the thread's own."""
    cases = [awkward_case(seed) for seed in range(7100, 7112)]
    given = [case.tensors(torch.float32) for case in cases]

    def run(i):
        with torch.no_grad(), pyeff.backend("cpp"):
            return call(factorized_conv2d, given[i], cases[i].options())

    alone = [run(i) for i in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        order = [i for _ in range(25) for i in range(len(cases))]
        random.Random(0).shuffle(order)
        for i, y in zip(order, pool.map(run, order), strict=True):
            assert torch.equal(y, alone[i]), cases[i]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_arguments_are_left_as_they_are(backend):
    case = Case(2, 16, 16, 16, (6, 7), outer="relu", given=ALL)
    tensors = case.tensors(torch.float32)
    tensors["residual"] = tensors["x"]
    before = {name: t.clone() for name, t in tensors.items()}
    with pyeff.backend(backend):
        for _ in range(3):
            y = call(factorized_conv2d, tensors, case.options())
            y.fill_(7.0)
        leaves = [t.requires_grad_() for t in {id(t): t for t in tensors.values()}.values()]
        grad_y = torch.randn_like(y)
        kept = grad_y.clone()
        torch.autograd.grad(call(factorized_conv2d, tensors, case.options()), leaves, grad_y)
    assert torch.equal(grad_y, kept)
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("outer", ["relu", "relu6"])
def test_a_result_changed_in_place_is_noticed(outer):
    """The backward reads it, as torch's relu does."""
    tensors = Case(outer=outer).tensors(torch.float32)
    tensors["x"].requires_grad_()
    y = call(factorized_conv2d, tensors, {"outer": outer})
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
