import os

import pytest
import torch
from branch_conv2d_cases import CASES, DEPTHWISE, GROUPS, PER_PAIR, SHARED, WANTED, BranchCase
from numerics import TOLERANCE, assert_close

import pyeff

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from pyeff.triton_kernels import branch_conv2d as launchers
from pyeff.triton_kernels.tiles import TILES, arithmetic, device_limits
from pyeff.triton_kernels.top_k_routes import branch_plan

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [SHARED, PER_PAIR, GROUPS, DEPTHWISE]
CIFAR = BranchCase(
    "CIFAR", 64, 64, (8, 8), (3, 3), padding=(1, 1, 1, 1), branches=20, routes=(16, 4)
)
LARGE = [
    CIFAR,
    BranchCase("for each pair", 32, 48, (14, 14), shared=False, branches=12, routes=(9, 3)),
    BranchCase("strided", 64, 128, (28, 28), (3, 3), (2, 2), branches=6, routes=(8, 2)),
    BranchCase("1x1", 256, 64, (14, 14), (1, 1), padding=(0, 0, 0, 0), branches=8, routes=(8, 4)),
    BranchCase("linear", 200, 100, (1, 1), (1, 1), padding=(0,) * 4, branches=20, routes=(64, 4)),
    BranchCase("16 groups", 64, 96, (14, 14), groups=16, branches=6, routes=(6, 2)),
    BranchCase("depth-wise, large", 96, 96, (14, 14), groups=96, branches=6, routes=(6, 2)),
]
TF32 = (4e-3, 8e-3)  # both factors are rounded to 10 bits; the results are near one


def innermost(tensor):
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


def run(case, x, weight, bias, index, grad_y, precision="ieee", **options):
    """y and the gradients of x, weight and bias, by the launchers."""
    shares = {"shares": options.pop("shares", None)}
    window = case.window()
    options["precision"] = precision
    return (
        launchers.forward(x, weight, bias, index, *window, **options),
        launchers.grad_input(grad_y, weight, x.shape, index, *window, **options),
        launchers.grad_weight(grad_y, x, weight.shape, index, *window, **options, **shares),
        launchers.grad_bias(grad_y, index, weight.shape[0]),
    )


def problem(case, dtype):
    """Tensors with channels innermost, and what the reference makes of them in float64."""
    x, weight, bias, index = case.tensors(dtype, "cuda")
    x, weight = innermost(x), innermost(weight)
    y = case.reference(x, weight, bias, index)
    grad_y = innermost(torch.randn_like(y).to(dtype))
    want = (y, *case.reference_gradients(grad_y, x, weight, bias, index))
    return (x, weight, bias, index, grad_y), want


def compare(case, got, want, tolerance=None):
    rows = got[0].shape[0] * got[0].shape[1] * got[0].shape[3] * got[0].shape[4]
    for name, actual, expected in zip(("y", *WANTED), got, want, strict=True):
        scale = 4.0 * max(1, rows) ** (0.5 if name in ("weight", "bias") else 0.0)
        if tolerance is None:
            assert_close(actual, expected, f"{case}: {name}", scale=scale)
        else:
            rtol, atol = tolerance
            torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol * scale)
    for actual, expected in zip(got[2:], want[2:], strict=True):
        assert not actual[expected == 0].any(), "branches that nobody chose"


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype):
    tensors, want = problem(case, dtype)
    compare(case, run(case, *tensors), want)


@pytest.mark.parametrize("case", [CIFAR, LARGE[4]], ids=str)
def test_tf32(case):
    tensors, want = problem(case, torch.float32)
    compare(case, run(case, *tensors, precision="tf32"), want, TF32)


def test_precision_follows_torch():
    tensors, _ = problem(CIFAR, torch.float32)
    before = torch.backends.cudnn.allow_tf32
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            followed = run(CIFAR, *tensors, precision=None)
            asked = run(CIFAR, *tensors, precision=precision)
            assert all(torch.equal(a, b) for a, b in zip(followed, asked, strict=True))
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_tile_of_the_table(dtype, precision):
    if dtype != torch.float32 and precision == "tf32":
        pytest.skip("a precision of float32")
    tensors, want = problem(CIFAR, dtype)
    kind, tables = arithmetic(dtype, precision), device_limits(tensors[0].device).architecture
    tolerance = TF32 if kind == "tf32" else TOLERANCE[dtype]
    for task in ("branch", "branch_grad_weight"):
        for tile in TILES[task, tables][kind]:
            compare(CIFAR, run(CIFAR, *tensors, precision, tile=tile, shares=3), want, tolerance)


@pytest.mark.parametrize("case", [CIFAR, DEPTHWISE], ids=str)
def test_the_order_of_the_pairs_changes_no_bit(case):
    (x, weight, bias, index, _), _ = problem(case, torch.float16)
    plan = branch_plan(index, case.branches)
    layer = (x, weight, bias, index, *case.window())
    assert torch.equal(launchers.forward(*layer, plan=plan), launchers.forward(*layer))


@pytest.mark.parametrize("case", [CIFAR, DEPTHWISE], ids=str)
def test_results_repeat_bit_for_bit(case):
    tensors, _ = problem(case, torch.float16)
    first, again = (run(case, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", [*KINDS, CIFAR], ids=str)
def test_cuda_graph_capture(case):
    tensors, _ = problem(case, torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, *tensors)  # compiles the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case, *tensors)
    fresh, _ = problem(case, torch.float16)
    # Other routes too: a plan from the time of the capture would show.
    fresh = (*fresh[:3], (fresh[3] + 1) % case.branches, fresh[4])
    x, weight, bias, index, grad_y = fresh
    want = (
        case.reference(x, weight, bias, index),
        *case.reference_gradients(grad_y, x, weight, bias, index),
    )
    for captured, new in zip(tensors, fresh, strict=True):
        captured.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    compare(case, got, want)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_nothing_waits_for_the_device(case):
    tensors, _ = problem(case, torch.float16)
    run(case, *tensors)  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [SHARED, PER_PAIR, DEPTHWISE], ids=str)
def test_a_route_to_no_branch_is_harmless(case):
    (x, weight, bias, _, grad_y), _ = problem(case, torch.float32)
    x[0] = float("nan")
    index = torch.tensor([[-1, 2**31 - 1], [2, -(2**31)]], dtype=torch.int32, device="cuda")
    y, grad_x, grad_w, grad_b = run(case, x, weight, bias, index, grad_y)
    torch.cuda.synchronize()
    assert not y[0].any()
    assert not y[1, 1].any()
    assert y[1, 0].all()
    assert not grad_x[0].any()
    chosen = torch.tensor([False, False, True], device="cuda")
    assert torch.equal(grad_w.flatten(1).any(dim=1), chosen)
    assert torch.equal(grad_b.any(dim=1), chosen)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile(training):
    (x, weight, bias, index, _), _ = problem(CIFAR, torch.float32)

    def layer(x, weight, bias, index):
        return pyeff.ops.branch_conv2d(x, weight, bias, index, padding=1).relu()

    weight.requires_grad_(training)
    torch._dynamo.reset()
    with pyeff.backend("triton"):
        compiled = torch.compile(layer, fullgraph=True)
        y, right = (f(x, weight, bias, index) for f in (compiled, layer))
        torch.testing.assert_close(y, right)
        if training:
            grads = (torch.autograd.grad(t.sum(), weight)[0] for t in (y, right))
            torch.testing.assert_close(*grads)


def test_more_than_2_to_the_31_elements():
    """2.1 billion values: the last image gives what that image gives alone."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, window = 2049, ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    x = torch.zeros(n, 128, 128, 64, dtype=torch.float16, device="cuda").movedim(-1, 1)
    x[-1].normal_()
    weight = innermost(torch.randn(3, 16, 64, 3, 3, dtype=torch.float16, device="cuda") / 24)
    index = (torch.arange(n, device="cuda", dtype=torch.int32) % 3)[:, None].contiguous()
    y = launchers.forward(x, weight, None, index, *window)
    grad_w = launchers.grad_weight(y, x, weight.shape, index, *window)
    last = (x[-1:], weight, None, index[-1:].contiguous(), *window)
    alone = launchers.forward(*last)
    assert torch.equal(y[-1:], alone)
    del y
    alone_w = launchers.grad_weight(alone, last[0], weight.shape, last[3], *window)
    torch.testing.assert_close(grad_w, alone_w, rtol=4e-3, atol=1.0)
