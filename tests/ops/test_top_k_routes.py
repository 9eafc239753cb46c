import pytest
import torch
from numerics import TOLERANCE, assert_close
from torch.fx.experimental.proxy_tensor import make_fx

import pyeff
from pyeff.ops import Routes, top_k_routes
from pyeff.reference.top_k_routes import top_k_routes as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton", "cuda")
]
SHAPES = [  # images, branches, k
    (1, 1, 1),
    (0, 5, 2),
    (3, 5, 5),
    (7, 20, 4),
    (128, 20, 12),
    (2, 1000, 17),
]


def chosen_by_hand(row, k):
    """Branch numbers by falling score, of equal scores the lower one first."""
    return sorted(range(len(row)), key=lambda b: (-row[b], b))[:k]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["binary", "softmax"])
def test_matches_reference(weights, dtype, device, backend):
    for n, branches, k in SHAPES:
        scores = torch.randn(n, branches, device=device).to(dtype).requires_grad_()
        wide = scores.detach().double().requires_grad_()
        with pyeff.backend(backend):
            routes = top_k_routes(scores, k, weights=weights)
        index, weight = reference(wide, k, weights=weights)
        assert isinstance(routes, Routes)
        assert routes.index.dtype == torch.int32
        assert routes.index.is_contiguous()
        assert routes.weight.dtype == dtype
        assert torch.equal(routes.index, index)
        assert_close(routes.weight, weight, "weight")
        assert routes.weight.requires_grad == (weights == "softmax")
        if weights == "softmax":
            grad = torch.randn(n, k, device=device).to(dtype)
            with pyeff.backend(backend):
                (got,) = torch.autograd.grad(routes.weight, scores, grad)
            (want,) = torch.autograd.grad(weight, wide, grad.double())
            assert_close(got, want, "gradient of scores")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_number(dtype, device, backend):
    scores = torch.randint(-2, 3, (40, 13)).to(dtype)
    scores[3] = 0
    scores[4, ::2] = -0.0  # equal to 0.0
    scores[4, 1::2] = 0.0
    scores[5, :7] = float("-inf")
    scores[6, 4:] = float("inf")
    with pyeff.backend(backend):
        index = top_k_routes(scores.to(device), 13).index.cpu()
    for row, got in zip(scores.tolist(), index.tolist(), strict=True):
        assert got == chosen_by_hand(row, 13)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_scores_of_any_strides(backend):
    wide = torch.randn(20, 14)
    for scores in (wide.t(), wide[:, ::2], wide[3:, 2:9], wide[:1].expand(6, -1)):
        with pyeff.backend(backend):
            routes = top_k_routes(scores, 3, weights="softmax")
        index, weight = reference(scores, 3, weights="softmax")
        assert torch.equal(routes.index, index)
        assert_close(routes.weight, weight.double(), "weight")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_gradcheck(backend):
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    call = lambda s: top_k_routes(s, 4, weights="softmax").weight  # noqa: E731
    with pyeff.backend(backend):
        assert torch.autograd.gradcheck(call, scores)
        assert torch.autograd.gradgradcheck(call, scores)


def test_binary_weights_are_ones_without_gradient():
    routes = top_k_routes(torch.randn(3, 6, requires_grad=True), 4)
    assert torch.equal(routes.weight, torch.ones(3, 4))
    assert not routes.weight.requires_grad


def test_is_registered_correctly():
    op = torch.ops.pyeff.top_k_routes.default
    torch.library.opcheck(op, (torch.randn(3, 6), 2, False))
    # Not test_aot_dispatch_dynamic: torch 2.13 adds up all outputs in place, beginning with index,
    # which is integer. test_compiles_whole takes that way.
    torch.library.opcheck(
        op,
        (torch.randn(3, 6, requires_grad=True), 2, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    index, weight = op(torch.randn(3, 6), 2, True)
    grad_op = torch.ops.pyeff.top_k_routes_grad.default
    torch.library.opcheck(grad_op, (torch.randn(3, 2), index, weight, 6))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    def weigh(scores):
        routes = top_k_routes(scores, 3, weights="softmax")
        return routes.index, (routes.weight * routes.index).sum()

    torch._dynamo.reset()
    compiled = torch.compile(weigh, backend=backend, fullgraph=True)
    scores = torch.randn(4, 7, requires_grad=True)
    (got_index, got), (want_index, want) = compiled(scores), weigh(scores)
    assert torch.equal(got_index, want_index)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores))


def test_exports_with_any_batch():
    class Gate(torch.nn.Module):
        def forward(self, scores):
            return tuple(top_k_routes(scores, 2, weights="softmax"))

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Gate(), (torch.randn(4, 6),), dynamic_shapes=({0: batch},))
    for n in (1, 9):
        scores = torch.randn(n, 6)
        got, want = program.module()(scores), Gate()(scores)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


def test_is_seen_by_tracers_and_transforms():
    traced = make_fx(lambda s: top_k_routes(s, 2, weights="softmax").weight)(torch.randn(3, 5))
    assert any("pyeff.top_k_routes" in str(node.target) for node in traced.graph.nodes)
    scores = torch.randn(4, 3, 5)
    mapped = torch.func.vmap(lambda s: top_k_routes(s, 2, weights="softmax"))(scores)
    for i in range(4):
        want = top_k_routes(scores[i], 2, weights="softmax")
        assert torch.equal(mapped.index[i], want.index)
        torch.testing.assert_close(mapped.weight[i], want.weight)


def test_keeps_the_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        routes = top_k_routes(torch.randn(3, 5), 2, weights="softmax")
    assert routes.weight.dtype == torch.float32
    assert TOLERANCE[routes.weight.dtype]


def test_shapes_without_values():
    routes = top_k_routes(torch.randn(3, 5, device="meta"), 2)
    assert routes.index.shape == routes.weight.shape == (3, 2)
    assert routes.index.dtype == torch.int32


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "k", "options", "message"),
    [
        (torch.randn(5), 1, {}, r"scores must be \[N, B\], got \[5\]"),
        (torch.randn(2, 5), 6, {}, "k must be from 1 to the number of branches, 5, got 6"),
        (torch.randn(2, 5), 0, {}, "k must be from 1 to .*, got 0"),
        (torch.randn(0, 0), 1, {}, "k must be from 1 to the number of branches, 0, got 1"),
        (torch.randn(2, 5), 2, dict(weights="mean"), 'weights must be "binary" or "softmax", got'),
    ],
)
def test_refuses_what_does_not_fit(scores, k, options, message):
    with pytest.raises(ValueError, match=f"top_k_routes: {message}"):
        top_k_routes(scores, k, **options)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        ([[1.0]], 1, "scores must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), 1, "scores must be a floating-point tensor, got"),
        (torch.randn(2, 3), 1.0, "k must be an int, got 1.0"),
        (torch.randn(2, 3), True, "k must be an int, got True"),
    ],
)
def test_refuses_what_is_no_tensor_or_number(scores, k, message):
    with pytest.raises(TypeError, match=f"top_k_routes: {message}"):
        top_k_routes(scores, k)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("weights", ["binary", "softmax"])
def test_refuses_nan(weights, backend):
    for branch in (0, 4):
        scores = torch.randn(3, 5)
        scores[2, branch] = float("nan")
        for grad in (False, True):
            with (
                pyeff.backend(backend),
                pytest.raises(ValueError, match="top_k_routes: scores must hold no NaN"),
            ):
                top_k_routes(scores.clone().requires_grad_(grad), 2, weights=weights)


def test_refuses_nan_in_a_compiled_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s: top_k_routes(s, 2).index, backend="aot_eager", fullgraph=True
    )
    scores = torch.randn(3, 5)
    compiled(scores)
    scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="scores must hold no NaN"):
        compiled(scores)


@pytest.mark.gpu
def test_looks_for_nan_on_a_gpu_where_asked():
    scores = torch.randn(3, 5, device="cuda")
    scores[1, 1] = float("nan")
    index = top_k_routes(scores, 5).index
    assert int(index.min()) == 0
    assert int(index.max()) == 4
    with pytest.raises(ValueError, match="scores must hold no NaN, got 1"):
        top_k_routes(scores, 2, validate=True)


def test_cuda_takes_nothing_from_the_cpu():
    with pyeff.backend("cuda"), pytest.raises(ValueError, match="cuda must get CUDA tensors"):
        top_k_routes(torch.randn(2, 3), 1)
