"""top_k_routes, its gradient and the launch plan: the CUDA kernels on the host."""

import pytest
import torch
from numerics import assert_close
from ops import test_top_k_routes as cases

import pyeff
from pyeff.ops import top_k_routes
from pyeff.ops._top_k_routes_cuda import launch_plan
from pyeff.reference.top_k_routes import top_k_routes as reference

OPERATORS = ("top_k_routes",)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["binary", "softmax"])
def test_matches_reference(simt, weights, dtype, monkeypatch):
    shapes = [(1, 1, 1), (0, 5, 2), (3, 5, 5), (7, 20, 4), (9, 40, 34), (2, 300, 17)]
    monkeypatch.setattr(cases, "SHAPES", shapes)
    cases.test_matches_reference(weights, dtype, "cpu", "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_ties_go_to_the_lower_number(simt, dtype):
    cases.test_ties_go_to_the_lower_number(dtype, "cpu", "cuda")


@pytest.mark.parametrize("reverse", [False, True])
def test_strides_and_the_order_of_the_lanes(simt, reverse):
    simt.set_reverse(reverse)
    scores = torch.randn(2 * 35, 6).t()[:, ::2]
    with pyeff.backend("cuda"):
        routes = top_k_routes(scores, 33, weights="softmax")
    index, weight = reference(scores.double(), 33, weights="softmax")
    assert torch.equal(routes.index, index)
    assert_close(routes.weight, weight, "weight")


def test_infinities_are_scores_and_nan_is_the_lowest(simt):
    scores = torch.tensor(
        [
            [0.0, 1.0, 1.0, 0.0],
            [-INF, -INF, -INF, -INF],
            [-INF, 2.0, INF, -INF],
            [NAN, -INF, NAN, 1.0],
            [NAN, NAN, NAN, NAN],
        ]
    )
    with pyeff.backend("cuda"):
        index = top_k_routes(scores, 3).index
        weight = top_k_routes(scores, 3, weights="softmax").weight
    assert index.tolist() == [[1, 2, 0], [0, 1, 2], [2, 1, 0], [3, 1, 0], [0, 1, 2]]
    assert weight[3:].isnan().all()
    assert_close(weight[0], scores[0, [1, 2, 0]].double().softmax(0), "weight")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("n", "branches", "k"), [(6, 5, 3), (1, 1, 1), (2, 9, 2), (0, 3, 2), (70, 3, 17), (9, 2000, 30)]
)
def test_plan(simt, n, branches, k, reverse):
    simt.set_reverse(reverse)
    index = torch.randint(-1, branches + 1, (n, k)).to(torch.int32)
    order, offsets = launch_plan(index, branches)
    flat = index.flatten().long()
    keys = torch.where((flat >= 0) & (flat < branches), flat, branches)
    assert order.tolist() == keys.argsort(stable=True).tolist()
    counts = torch.bincount(keys, minlength=branches + 1)[:branches]
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def test_plan_refuses_more_branches_than_fit(simt):
    index = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"branch_plan: .*branches must be at most 12287"):
        launch_plan(index, 12288)


def test_launches_are_small_and_on_the_callers_stream(simt):
    with pyeff.backend("cuda"):
        index = top_k_routes(torch.randn(9, 20), 4).index
    launch_plan(index, 20)
    launches = simt.launches()
    assert [(r["name"], r["grid"]) for r in launches] == [
        ("top_k_routes", (3, 1, 1)),
        ("branch_plan", (1, 1, 1)),
    ]
    assert {(r["stream"], r["device"]) for r in launches} == {(0x517, 0)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, s, i, w: n.top_k_routes_cuda(s, i[:1], w, False), "index must have a row for"),
        (lambda n, s, i, w: n.top_k_routes_cuda(s, i, w[:, :1], False), "weight must have shape"),
        (lambda n, s, i, w: n.top_k_routes_cuda(s, i, w.double(), False), "weight must have the"),
        (lambda n, s, i, w: n.top_k_routes_cuda(s[0], i, w, False), "scores must have 2 dim"),
        (lambda n, s, i, w: n.branch_plan_cuda(i, i.view(-1)[:3], i[0]), "order must have shape"),
    ],
)
def test_refuses_what_is_not_safe(simt, call, message):
    scores, index = torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        call(simt, scores, index, torch.ones(3, 2))
