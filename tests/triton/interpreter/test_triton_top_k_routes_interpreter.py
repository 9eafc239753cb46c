import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from numerics import assert_close
from pyeff.triton_kernels import top_k_routes as launchers

from pyeff.reference.top_k_routes import top_k_routes as reference

pytestmark = pytest.mark.interpreter

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("weights", ["binary", "softmax"])
@pytest.mark.parametrize(("n", "branches", "k"), [(5, 7, 3), (1, 1, 1), (3, 20, 4), (4, 6, 6)])
def test_matches_reference(n, branches, k, weights):
    scores = torch.randn(n, branches)
    index, weight = launchers.forward(scores, k, weights)
    want_index, want_weight = reference(scores.double(), k, weights=weights)
    assert index.dtype == torch.int32
    assert torch.equal(index, want_index)
    assert_close(weight, want_weight, "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_strides(dtype):
    scores = torch.randn(2 * 5, 6).to(dtype).t()[:, ::2]
    index, weight = launchers.forward(scores, 2, "softmax")
    want_index, want_weight = reference(scores, 2, weights="softmax")
    assert weight.dtype == dtype
    assert torch.equal(index, want_index)
    assert_close(weight, want_weight.double(), "weight")


def test_more_images_than_a_program_takes(monkeypatch):
    monkeypatch.setattr(launchers, "_TILE", 16)
    scores = torch.randn(7, 6).round()  # many ties
    assert torch.equal(launchers.forward(scores, 4)[0], reference(scores, 4)[0])


def test_doubles_that_floats_cannot_tell_apart():
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64)
    assert launchers.forward(scores, 3)[0].tolist() == [[1, 0, 2]]


def test_ties_go_to_the_lower_branch_and_infinities_are_scores():
    scores = torch.tensor(
        [
            [0.0, 1.0, 1.0, 0.0],
            [-INF, -INF, -INF, -INF],
            [-INF, 2.0, INF, -INF],
            [3.0, 3.0, 3.0, 4.0],
        ]
    )
    index, weight = launchers.forward(scores, 3)
    assert index.tolist() == [[1, 2, 0], [0, 1, 2], [2, 1, 0], [3, 0, 1]]
    assert (weight == 1).all()


def test_nan_counts_as_lowest_and_shows_in_the_weight():
    scores = torch.tensor([[NAN, -INF, NAN, 1.0], [NAN, NAN, NAN, NAN], [3.0, 0.0, 1.0, 2.0]])
    index, weight = launchers.forward(scores, 3, "softmax")
    assert index.tolist() == [[3, 1, 0], [0, 1, 2], [0, 3, 2]]
    assert weight[:2].isnan().all()
    assert_close(weight[2], scores[2, [0, 3, 2]].double().softmax(0), "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_softmax(dtype):
    scores = torch.randn(5, 7).to(dtype)
    index, weight = launchers.forward(scores, 3, "softmax")
    wide = scores.double().requires_grad_()
    want = reference(wide, 3, weights="softmax")[1]
    slope = torch.randn(3, 5).to(dtype).t()
    expected = torch.autograd.grad(want, wide, slope.double())[0]
    grad = launchers.grad_scores(slope, index, weight, 7)
    assert_close(grad, expected, "gradient of scores")
    assert not grad[expected == 0].any()


def test_empty_batch():
    index, weight = launchers.forward(torch.empty(0, 5), 2, "softmax")
    assert index.shape == weight.shape == (0, 2)
    assert launchers.grad_scores(weight, index, weight, 5).shape == (0, 5)


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize(("n", "branches", "k"), [(6, 5, 3), (1, 1, 1), (2, 9, 2), (0, 3, 2)])
def test_plan(n, branches, k, block, monkeypatch):
    monkeypatch.setattr(launchers, "_PAIRS", block)
    index = torch.randint(-1, branches + 1, (n, k)).to(torch.int32)
    plan = launchers.branch_plan(index, branches)
    flat = index.flatten().long()
    keys = torch.where((flat >= 0) & (flat < branches), flat, branches)
    assert plan.order.tolist() == keys.argsort(stable=True).tolist()
    counts = torch.bincount(keys, minlength=branches + 1)[:branches]
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
