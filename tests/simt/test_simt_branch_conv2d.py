"""branch_conv2d and its gradients: the CUDA kernels on the host."""

import pytest
import torch
from numerics import assert_close
from ops import test_branch_conv2d as cases
from ops import test_branch_linear as linear
from ops.branch_cases import CASES, Case, random_case

import pyeff
from pyeff.ops import _branch_conv2d_op, branch_conv2d
from pyeff.reference.branch_conv2d import branch_conv2d as reference

OPERATORS = ("branch_conv2d", "top_k_routes")
HALVES = [torch.float16, torch.bfloat16]
# What each dtype runs beside float32, which runs everything: tiles with and without whole pieces,
# several of them, groups, gradients that routes share.
SOME = [
    "small, no two dimensions equal",
    "empty batch",
    "a branch twice in a row, others never",
    "stride and dilation, pairs",
    "groups",
    "depth-wise, pairs, strided and dilated",
    "wide branch, few images",
]


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(simt, name):
    cases.check(CASES[name], torch.float32, "cpu", "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_matches_reference_in_other_precisions(simt, name, dtype):
    cases.check(CASES[name], dtype, "cpu", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_problems(simt, dtype):
    for seed in range(8):
        case = random_case(seed)
        cases.check(case, dtype, "cpu", "cuda", what=f"{case}")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_accepts_any_layout(simt, layout):
    cases.check(CASES["1x1 strided, pairs"], torch.float16, "cpu", "cuda", layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_order_of_threads_changes_nothing(simt, dtype):
    case = Case(2, 2, 3, 24, 40, (5, 6), padding=1)
    tensors = [t.requires_grad_() for t in case.tensors(dtype)]
    index = case.routes()
    runs = []
    with pyeff.backend("cuda"):
        for reverse in (False, True):
            simt.set_reverse(reverse)
            y = branch_conv2d(*tensors, index, padding=1)
            runs.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["small, no two dimensions equal", "wide branch, few images"])
def test_tf32_follows_torch(simt, name):
    case = CASES[name]
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    index = case.routes()
    want = reference(*wide, index, **case.options())
    grad_y = torch.randn(want.shape)
    wants = (want, *torch.autograd.grad(want, wide, grad_y.double()))
    # The gradient of the bias has no products.
    rounded = ("y", "gradient of x", "gradient of weight")
    for allowed in (False, True):
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
        with pyeff.backend("cuda"):
            y = branch_conv2d(*tensors, index, **case.options())
            got = (y, *torch.autograd.grad(y, tensors, grad_y))
        for what, g, w in zip(rounded, got, wants, strict=False):
            error = ((g - w).abs().max() / w.abs().max()).item()
            assert (1e-5 < error < 5e-3) if allowed else error < 1e-5, what


@pytest.mark.parametrize("name", ["shared rows", "a row for each pair"])
def test_branch_linear(simt, name):
    linear.test_matches_reference(name, torch.bfloat16, "cpu", "cuda")


def test_weights_that_change_unseen_are_read(simt):
    """No copy of a weight is kept: the replay of a CUDA graph raises no version."""
    case = Case(3, 2, 4, 8, 8, (4, 5), padding=1)
    x, weight, bias = case.tensors(torch.float32)
    index = case.routes()
    for _ in range(3):
        weight.data.mul_(2)
        with torch.no_grad(), pyeff.backend("cuda"):
            y = branch_conv2d(x, weight, bias, index, padding=1)
        want = reference(x.double(), weight.double(), bias.double(), index, padding=1)
        assert_close(y, want, "y", scale=8)


def test_a_route_to_no_branch_gives_zeros_and_takes_no_part(simt, monkeypatch):
    monkeypatch.setattr(_branch_conv2d_op, "kernel_index", lambda _, index, *__: index)
    for groups in (1, 4):
        case = Case(2, 2, 3, 8, 8, (4, 5), padding=1, groups=groups)
        x, weight, bias = case.tensors(torch.float32)
        index = torch.tensor([[-1, 2], [2**31 - 1, 3]], dtype=torch.int32)
        x[1] = torch.nan  # must not be read for pairs without a branch
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        grad_y = torch.randn(2, 2, 8, 4, 5)
        with pyeff.backend("cuda"):
            y = branch_conv2d(x, weight, bias, index, **case.options())
            got = torch.autograd.grad(y, leaves, grad_y)
        wide = [t.detach().double().nan_to_num().requires_grad_() for t in leaves]
        exists = ((index >= 0) & (index < 3))[..., None, None, None]
        want = reference(*wide, index.clamp(0, 2), **case.options()) * exists
        assert_close(y, want, "y")
        wants = torch.autograd.grad(want, wide, grad_y.double())
        for name, g, w in zip(("x", "weight", "bias"), got, wants, strict=True):
            assert_close(g, w, f"gradient of {name}", scale=20.0)


def test_launches_are_on_the_callers_stream(simt):
    case = CASES["cifar branch"]
    leaves = [t.requires_grad_() for t in case.tensors(torch.float32)]
    with pyeff.backend("cuda"):
        branch_conv2d(*leaves, case.routes(), **case.options()).sum().backward()
    launches = simt.launches()
    assert sorted(r["name"] for r in launches) == [
        "branch_conv2d",
        "branch_conv2d_grad_bias",
        "branch_conv2d_grad_input",
        "branch_conv2d_grad_weight",
        "branch_plan",
    ]
    assert {(r["stream"], r["device"]) for r in launches} == {(0x517, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.randn(3, 8, 8, 3, 3)), "weight must be contiguous"),
        (dict(y=torch.empty(2, 2, 8, 4, 5)), "y must have its channels side by side"),
        (dict(bias=torch.randn(3, 7)), "bias must have shape"),
        (dict(index=torch.zeros(2, 3, dtype=torch.int32)), r"y must be \[N, k, C, H, W\]"),
        (dict(x=torch.randn(2, 4, 5, 8).movedim(3, 1).half()), "x must have the dtype of weight"),
    ],
)
def test_refuses_what_is_not_safe(simt, change, message):
    arguments = {
        "x": torch.randn(2, 4, 5, 8).movedim(3, 1),
        "weight": torch.randn(3, 8, 3, 3, 8).movedim(4, 2),
        "bias": None,
        "index": torch.zeros(2, 2, dtype=torch.int32),
        "y": torch.empty(2, 2, 4, 5, 8).movedim(4, 2),
        "problem": (1, 1, 1, 1, 1, 1, 1, 1, 0),
    }
    with pytest.raises(ValueError, match=f"branch_conv2d: {message}"):
        simt.branch_conv2d_forward_cuda(**(arguments | change))
