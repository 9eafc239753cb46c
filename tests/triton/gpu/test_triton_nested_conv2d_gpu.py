import os

import pytest
import torch
from nested_cases import CASES, DEPTHWISE, GROUPS, INDEX, RANGE, Case
from numerics import TOLERANCE, assert_close

import pyeff

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from pyeff.triton_kernels import nested_conv2d as launchers
from pyeff.triton_kernels.tiles import TILES, arithmetic, device_limits

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [RANGE, INDEX, GROUPS, DEPTHWISE]
LEVEL = Case("half of 256 channels", 256, 256, (0, 128), (64, 192), (14, 14), 8)
LARGE = [
    LEVEL,
    Case("strided, 56 pixels", 64, 128, (16, 64), (0, 96), (56, 56), 4, stride=(2, 2)),
    Case("7x7 stem", 3, 64, (0, 3), (0, 48), (64, 64), 4, (7, 7), (2, 2), (3, 3, 3, 3)),
    Case("1x1", 256, 512, (0, 200), (3, 500), (28, 28), 4, (1, 1), padding=(0, 0, 0, 0)),
    Case("32 groups", 128, 256, (32, 96), (64, 192), (28, 28), 4, groups=32),
    Case("depth-wise", 192, 192, (64, 160), (64, 160), (28, 28), 4, groups=192),
]
TF32 = (4e-3, 8e-3)  # both factors are rounded to 10 bits; the results are near one


def run(case, x, weight, bias, grad_y, precision="ieee", **options):
    """y and the gradients of x and weight, by the launchers."""
    shares = {"shares": options.pop("shares", None)}
    layer = (*case.selections(x.device), *case.window())
    options["precision"] = precision
    return (
        launchers.forward(x, weight, bias, *layer, **options),
        launchers.grad_input(grad_y, weight, x.shape, *layer, **options),
        launchers.grad_weight(grad_y, x, weight.shape, *layer, **options, **shares),
    )


def problem(case, dtype):
    """Tensors in channels_last, and what the reference makes of them in float64."""
    tensors = case.tensors(dtype, "cuda")
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in tensors[:2])
    y = case.reference(x.double(), weight.double(), tensors[2].double())
    grad_y = torch.randn_like(y).to(dtype).contiguous(memory_format=torch.channels_last)
    return (x, weight, tensors[2], grad_y), (y, *case.reference_gradients(grad_y, x, weight))


def compare(case, got, want, tolerance=None):
    pixels = got[0].shape[0] * got[0].shape[2] * got[0].shape[3]
    for name, actual, expected in zip(("y", "grad_x", "grad_weight"), got, want, strict=True):
        scale = 4.0 * max(1, pixels) ** (0.5 if name == "grad_weight" else 0.0)
        if tolerance is None:
            assert_close(actual, expected, f"{case}: {name}", scale=scale)
        else:
            rtol, atol = tolerance
            torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol * scale)
    assert not got[2][want[2] == 0].any()


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(case, dtype):
    tensors, want = problem(case, dtype)
    compare(case, run(case, *tensors), want)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_tf32(case):
    tensors, want = problem(case, torch.float32)
    compare(case, run(case, *tensors, precision="tf32"), want, TF32)


def test_precision_follows_torch():
    tensors, _ = problem(LEVEL, torch.float32)
    before = torch.backends.cudnn.allow_tf32
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            followed = run(LEVEL, *tensors, precision=None)
            asked = run(LEVEL, *tensors, precision=precision)
            assert all(torch.equal(a, b) for a, b in zip(followed, asked, strict=True))
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_tile_of_the_table(dtype, precision):
    if dtype != torch.float32 and precision == "tf32":
        pytest.skip("a precision of float32")
    tensors, want = problem(LEVEL, dtype)
    kind, tables = arithmetic(dtype, precision), device_limits(tensors[0].device).architecture
    tolerance = TF32 if kind == "tf32" else TOLERANCE[dtype]
    for task in ("gemm", "gather", "grad_weight"):
        for tile in TILES[task, tables][kind]:
            compare(LEVEL, run(LEVEL, *tensors, precision, tile=tile, shares=3), want, tolerance)


@pytest.mark.parametrize("case", [LEVEL, DEPTHWISE], ids=str)
def test_results_repeat_bit_for_bit(case):
    tensors, _ = problem(case, torch.float16)
    first, again = (run(case, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", [*KINDS, LEVEL], ids=str)
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
    fresh, want = problem(case, torch.float16)
    for captured, new in zip(tensors, fresh, strict=True):
        captured.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    compare(case, got, want)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_serves_all_levels(training):
    (x, weight, bias, _), _ = problem(LEVEL, torch.float32)
    compilations = []

    def counting(module, inputs):
        compilations.append(module)
        return module.forward

    def layer(x, weight, bias, width):
        return pyeff.ops.nested_conv2d(
            x, weight, bias, in_range=(0, width), out_range=(0, width), padding=1
        ).relu()

    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    weight.requires_grad_(training)
    torch._dynamo.reset()
    with pyeff.backend("triton"):
        for width in (32, 64, 96, 128, 17, 80):
            part = x[:, :width]
            y = compiled(part, weight, bias, width)
            torch.testing.assert_close(y, layer(part, weight, bias, width))
            if training:
                grad = torch.autograd.grad(y.sum(), weight)[0]
                assert not grad[width:].any()
                assert grad[:width, :width].any()
    assert len(compilations) <= 3


def test_inductor():
    (x, weight, bias, _), _ = problem(LEVEL, torch.float16)

    def layer(x):
        return pyeff.ops.nested_conv2d(
            x, weight, bias, in_range=(0, 128), out_range=(64, 192), padding=1
        ).relu()

    torch._dynamo.reset()
    with pyeff.backend("triton"):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_an_index_outside_of_the_layer_is_harmless():
    (x, weight, _, grad_y), _ = problem(INDEX, torch.float32)
    in_index = torch.tensor([7, -(2**40), 2**40], device="cuda")
    out_index = torch.tensor([0, 2**40, -1, 4, 2], device="cuda")
    layer = (in_index, out_index, *INDEX.window())
    y = launchers.forward(x, weight, None, *layer)
    grad_w = launchers.grad_weight(grad_y, x, weight.shape, *layer)
    torch.cuda.synchronize()
    assert not y[:, [1, 2]].any()
    assert (grad_w != 0).any(dim=(2, 3)).nonzero().tolist() == [[0, 7], [2, 7], [4, 7]]


def test_more_than_2_to_the_31_elements():
    """A batch of 2.1 billion values: its last image gives what that image gives alone."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(2049, 64, 128, 128, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1].normal_()
    weight = torch.randn(64, 64, 3, 3, dtype=torch.float16, device="cuda") / 24
    layer = ((0, 64), (0, 16), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    y = launchers.forward(x, weight, None, *layer)
    grad_w = launchers.grad_weight(y, x, weight.shape, *layer)
    alone = launchers.forward(x[-1:], weight, None, *layer)
    assert torch.equal(y[-1:], alone)
    del y
    alone_w = launchers.grad_weight(alone, x[-1:], weight.shape, *layer)
    torch.testing.assert_close(grad_w, alone_w, rtol=4e-3, atol=1.0)
