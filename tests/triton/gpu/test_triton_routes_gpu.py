"""top_k_routes, its plan, and combine on a GPU."""

import os

import pytest
import torch
from numerics import assert_close

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from pyeff.triton_kernels import combine as combine_launchers
from pyeff.triton_kernels import top_k_routes as launchers

from pyeff.reference.combine import combine as combine_reference
from pyeff.reference.top_k_routes import top_k_routes as reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(
    ("n", "branches", "k"), [(128, 20, 4), (1, 1, 1), (37, 50, 50), (3, 3000, 7)]
)
def test_routes_match_the_reference(n, branches, k, dtype):
    scores = torch.randn(n, branches, device="cuda").to(dtype)  # halves have many ties
    index, weight = launchers.forward(scores, k, "softmax")
    wide = scores.double().requires_grad_()
    want_index, want_weight = reference(wide, k, weights="softmax")
    assert torch.equal(index, want_index)
    assert_close(weight, want_weight, "weight")
    slope = torch.randn(n, k, device="cuda").to(dtype)
    expected = torch.autograd.grad(want_weight, wide, slope.double())[0]
    assert_close(launchers.grad_scores(slope, index, weight, branches), expected, "gradient")
    assert (launchers.forward(scores, k)[1] == 1).all()


def test_nan_scores_name_branches():
    scores = torch.tensor([[NAN, 0.0, NAN, 1.0], [NAN, NAN, NAN, NAN]], device="cuda")
    index, weight = launchers.forward(scores, 3, "softmax")
    assert index.tolist() == [[3, 1, 0], [0, 1, 2]]
    assert weight.isnan().all()


@pytest.mark.parametrize(
    ("n", "branches", "k"), [(128, 20, 4), (1, 1, 1), (700, 50, 3), (2, 900, 2)]
)
def test_plan(n, branches, k):
    index = torch.randint(-1, branches + 1, (n, k), device="cuda").to(torch.int32)
    order, offsets = launchers.branch_plan(index, branches)
    flat = index.flatten().long()
    keys = torch.where((flat >= 0) & (flat < branches), flat, branches)
    assert torch.equal(order.long(), keys.argsort(stable=True))
    counts = torch.bincount(keys.cpu(), minlength=branches + 1)[:branches]
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def combine_problem(dtype, outputs, features, n=33, k=4, branches=20):
    scores = torch.rand(n, branches, device="cuda")
    scores[:, branches // 2 :] /= 2  # branches that are rarely taken
    index = scores.topk(k, dim=1).indices.to(torch.int32)
    y = torch.randn(n, k, features, device="cuda").to(dtype)
    projection = (torch.randn(branches, outputs, features, device="cuda") / features**0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda").to(dtype)
    weight = torch.rand(n, k, device="cuda")
    return y, projection, bias, index, weight, torch.randn(n, outputs, device="cuda").to(dtype)


def combine_run(y, projection, bias, index, weight, grad_out):
    return (
        combine_launchers.forward(y, projection, bias, index, weight),
        *combine_launchers.grad_input(grad_out, y, projection, index, weight),
        combine_launchers.grad_projection(grad_out, y, projection.shape, index, weight),
    )


def combine_expected(y, projection, bias, index, weight, grad_out):
    leaves = [t.double().requires_grad_() for t in (y, weight, projection)]
    out = combine_reference(leaves[0], leaves[2], bias.double(), index, leaves[1])
    return out, *torch.autograd.grad(out, leaves, grad_out.double())


def combine_compare(got, want):
    for name, actual, right in zip(("out", "y", "weight", "projection"), got, want, strict=True):
        assert_close(actual, right, name, scale=16.0)
    assert not got[3][want[3] == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "features"), [(100, 64), (1, 1), (1000, 130), (7, 513)])
def test_combine_matches_the_reference(outputs, features, dtype):
    tensors = combine_problem(dtype, outputs, features)
    combine_compare(combine_run(*tensors), combine_expected(*tensors))


def test_combine_with_stray_routes_is_harmless():
    y, projection, bias, index, weight, grad_out = combine_problem(torch.float32, 10, 8)
    index.copy_(torch.tensor([-1, 20, 2**31 - 1, -(2**31)]))
    y[:] = NAN
    out, grad_y, grad_weight, grad_p = combine_run(y, projection, bias, index, weight, grad_out)
    torch.cuda.synchronize()
    assert torch.equal(out, bias.expand_as(out))
    assert not any(t.any() for t in (grad_y, grad_weight, grad_p))


def everything(scores, y, projection, bias, grad_out):
    """Gate to result and back, as a training step runs it."""
    index, weight = launchers.forward(scores, 4, "softmax")
    results = combine_run(y, projection, bias, index, weight, grad_out)
    return (*results, launchers.grad_scores(results[2], index, weight, 20), index)


def test_cuda_graph_capture_and_nothing_waits():
    y, projection, bias, _, _, grad_out = combine_problem(torch.float16, 100, 64)
    scores = torch.randn(33, 20, device="cuda")
    inputs = (scores, y, projection, bias, grad_out)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(*inputs)
    for tensor in inputs:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, everything(*inputs), strict=True))
    weight = reference(scores, 4, weights="softmax")[1]
    want = combine_expected(y, projection, bias, got[-1], weight, grad_out)
    combine_compare(got[:4], want)
