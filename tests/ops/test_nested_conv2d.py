import pytest
import torch
from numerics import DEVICES, assert_close, in_layout
from ops.conv_cases import CASES, Case, random_case
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.ops import nested_conv2d
from pyeff.ops._conv_args import padding_sides, pair
from pyeff.reference.nested_conv2d import nested_conv2d as reference

ISAS = pyeff.info()["isas"]
LAYOUTS = ["contiguous", "channels_last", "slice of channels_last", "slice of rows", "transposed"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def backends(device):
    return ["reference", "torch", "cpp"] if device == "cpu" else ["torch", "triton", "cuda"]


ROUTES = [("cpu", b) for b in backends("cpu")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in backends("cuda")
]


def expected(case, x, weight, bias):
    """The reference in float64."""
    options = case.options(x.device)
    if isinstance(case.padding, str):
        stride, dilation = pair("t", "s", case.stride, 1), pair("t", "d", case.dilation, 1)
        options["padding"] = padding_sides("t", case.padding, case.kernel, stride, dilation)
    wide = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    for t in wide:
        if t is not None:
            t.requires_grad_()
    return reference(*wide, **options), [t for t in wide if t is not None]


def check(case, dtype, device, backend, layout="channels_last", what=""):
    """Value and every gradient of one problem against the float64 reference."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take float16, bfloat16 and float32")
    x, weight, bias = case.tensors(dtype, device)
    x = in_layout(x, layout)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    want, wide = expected(case, x, weight, bias)
    grad_y = torch.randn_like(want).to(dtype)
    with pyeff.backend(backend):
        y = nested_conv2d(x, weight, bias, **case.options(device))
        assert y.dtype == dtype
        assert y.shape == want.shape
        assert y.numel() == 0 or y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, want, f"{what} y")
        got = torch.autograd.grad(y, leaves, grad_y)
    want_grads = torch.autograd.grad(want, wide, grad_y.double())
    pixels = max(1, y.shape[0] * y.shape[2] * y.shape[3])
    for name, g, w in zip(("x", "weight", "bias"), got, want_grads, strict=False):
        scale = 1.0 if name == "x" else pixels**0.5
        assert_close(g, w, f"{what} gradient of {name}", scale=4 * scale)
        if name != "x":
            assert torch.equal(g == 0, w == 0) or dtype != torch.float64
            outside = w == 0 if name == "weight" else torch.zeros_like(w, dtype=torch.bool)
            assert not g[outside].any(), f"{what} gradient of {name} outside of the selection"


@pytest.mark.parametrize(("device", "backend"), ROUTES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matches_reference(case, dtype, device, backend):
    check(case, dtype, device, backend)


# Of this one oneDNN leaves bfloat16 weight gradients unwritten; the reference is torch as it is.
UNWRITTEN = "1x3 strided over one column"


@pytest.mark.parametrize(("device", "backend"), ROUTES)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_matches_reference_in_half_precision(dtype, device, backend):
    for name, case in CASES.items():
        if backend == "reference" and dtype == torch.bfloat16 and name == UNWRITTEN:
            continue
        check(case, dtype, device, backend, what=name)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_reference(isa):
    with pyeff.isa(isa):
        for name, case in CASES.items():
            for dtype in DTYPES:
                check(case, dtype, "cpu", "cpp", what=f"{name}, {dtype}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", range(4))
def test_random_problems(isa, block):
    with pyeff.isa(isa):
        for seed in range(block * 60, block * 60 + 60):
            check(random_case(seed), torch.float32, "cpu", "cpp", what=f"{random_case(seed)}")


@pytest.mark.parametrize(("device", "backend"), ROUTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accepts_any_layout(layout, device, backend):
    case = CASES["interval in the middle, not aligned to a vector"]
    check(case, torch.float32, device, backend, layout)


def test_reads_an_expanded_batch():
    x, weight, bias = CASES["1x1"].tensors(torch.float32)
    x = in_layout(x[:1], "channels_last").expand(4, -1, -1, -1)
    case = CASES["1x1"]
    want = reference(x.double(), weight.double(), bias.double(), **case.options())
    assert_close(nested_conv2d(x, weight, bias, **case.options()), want, "expanded")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for case in (Case(7, 40, 70, (17, 19), padding=1), Case(1, 64, 128, (28, 28), padding=1)):
            check(case, torch.float32, "cpu", "cpp", what=f"{threads} threads")
    finally:
        torch.set_num_threads(before)


def test_weight_in_channels_last_and_a_part_of_a_larger_weight():
    case = CASES["padded, prefix of both sides"]
    x, weight, bias = case.tensors(torch.float32)
    want = reference(x.double(), weight.double(), bias.double(), **case.options())
    for w in (in_layout(weight, "channels_last"), in_layout(weight, "slice of rows")):
        with pyeff.backend("cpp"), torch.no_grad():
            for _ in range(3):  # read in place at first, packed later
                assert_close(nested_conv2d(x, w, bias, **case.options()), want, "y")


def test_call_key_tells_apart_what_a_plan_depends_on():
    x, w, b = torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 3, 3), torch.zeros(4)
    calls = [
        (x, w, b),
        (x, w, None),
        (x[:, :1], w, b),
        (x, w[:2], b),
        (x, w, b[:2]),
        (x[0], w, b),
        (x.double(), w, b),
        (x, w.bfloat16(), b),
        (x, w, b.half()),
    ]
    assert len({pyeff._C.call_key(*call) for call in calls}) == len(calls)
    assert pyeff._C.call_key(x + 1, w, b) == pyeff._C.call_key(x, w, b)


# --- packed weights -------------------------------------------------------------------------------


def test_packed_weight_follows_every_change_of_the_weight():
    case = CASES["padded, prefix of both sides"]
    x, weight, bias = case.tensors(torch.float32)

    def check_now():
        with torch.no_grad(), pyeff.backend("cpp"):
            for _ in range(3):
                y = nested_conv2d(x, weight, bias, **case.options())
        want = reference(x.double(), weight.double(), bias.double(), **case.options())
        assert_close(y, want, "y")

    check_now()
    weight.mul_(2)
    check_now()
    weight.set_(torch.randn_like(weight))
    check_now()
    pyeff.clear_packed(weight)
    check_now()


def test_packed_weight_follows_a_fused_optimiser():
    x, weight = torch.randn(1, 8, 6, 6), torch.nn.Parameter(torch.randn(8, 8, 3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    with pyeff.backend("cpp"):
        for _ in range(3):
            with torch.no_grad():
                for _ in range(3):
                    y = nested_conv2d(x, weight, padding=1)
            want = reference(x.double(), weight.double(), padding=1)
            assert_close(y, want, "y", scale=10)
            weight.grad = torch.ones_like(weight)
            optimizer.step()


def test_one_packed_copy_serves_all_levels_and_dies_with_the_weight():
    from pyeff.ops._packed import _packed

    pyeff.clear_packed()
    weight = torch.randn(64, 64, 3, 3) / 24
    with torch.no_grad(), pyeff.backend("cpp"):
        for level in (16, 32, 48, 64, 16):
            x = torch.randn(1, level, 8, 8)
            y = nested_conv2d(x, weight, in_range=(0, level), out_range=(0, level), padding=1)
            want = reference(
                x.double(), weight.double(), in_range=(0, level), out_range=(0, level), padding=1
            )
            assert_close(y, want, f"level {level}")
    assert len(_packed) == 1
    assert isinstance(_packed.get(weight).copy, torch.Tensor)
    del weight
    assert len(_packed) == 0


def test_no_packed_copy_in_training_or_of_inference_tensors():
    from pyeff.ops._packed import _packed

    pyeff.clear_packed()
    x = torch.randn(1, 8, 6, 6)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    with torch.inference_mode():
        frozen = torch.randn(8, 8, 3, 3)
    with pyeff.backend("cpp"):
        for _ in range(3):
            nested_conv2d(x, weight)
        with torch.inference_mode():
            for _ in range(3):
                y = nested_conv2d(x, frozen)
    assert_close(y, reference(x.double(), frozen.double()), "y")
    assert len(_packed) == 0


def test_clear_packed_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="clear_packed: weight must be a tensor or None"):
        pyeff.clear_packed("weight")


# --- gradients, registration, compilers -----------------------------------------------------------

SMALL = {
    "range": Case(2, 6, 5, (5, 4), in_range=(1, 4), out_range=(2, 5), padding=1),
    "index": Case(1, 5, 6, (4, 5), in_index=(4, 1), out_index=(0, 5, 2), stride=2, padding=1),
    "groups": Case(1, 4, 6, (4, 4), groups=2, in_range=(2, 4), out_range=(3, 6), padding=1),
    "same, even": Case(1, 3, 2, (4, 4), (2, 2), padding="same"),
}


def double_tensors(case):
    return [t.requires_grad_() for t in case.tensors(torch.float64)]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(case, backend):
    with pyeff.backend(backend):
        tensors = double_tensors(case)
        call = lambda *t: nested_conv2d(*t, **case.options())  # noqa: E731
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


def op_arguments(case, device="cpu", dtype=torch.float32):
    from pyeff.ops._nested_conv2d_backends import Conv
    from pyeff.ops._nested_conv2d_op import lower

    x, weight, bias = case.tensors(dtype, device)
    options = case.options(device)
    stride, dilation = pair("t", "s", case.stride, 1), pair("t", "d", case.dilation, 1)
    sides = padding_sides("t", case.padding, case.kernel, stride, dilation)
    select = [
        options[f"{s}_index"] if f"{s}_index" in options else options[f"{s}_range"] or (0, n)
        for s, n in (("in", case.channels), ("out", case.outputs))
    ]
    return x, weight, bias, lower(Conv(*select, stride, sides, dilation, case.groups))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_is_registered_correctly(case, device):
    x, weight, bias, conv = op_arguments(case, device)
    op = torch.ops.pyeff.nested_conv2d.default
    for args in ((x, weight, bias), (x.requires_grad_(), weight.requires_grad_(), None)):
        torch.library.opcheck(op, (*args, *conv))
    x, weight = x.detach(), weight.detach()
    grad_y = torch.randn_like(op(x, weight, None, *conv))
    torch.library.opcheck(
        torch.ops.pyeff.nested_conv2d_grad_input.default,
        (grad_y, weight, *x.shape[2:], *conv),
    )
    torch.library.opcheck(
        torch.ops.pyeff.nested_conv2d_grad_weight.default,
        (grad_y, x, list(weight.shape), list(weight.stride()), *conv),
    )


def levels_of(weight):
    return [(0, c) for c in range(4, weight.shape[0] + 1, 4)]


def run_level(x, weight, bias, lo, hi):
    return nested_conv2d(x, weight, bias, in_range=(lo, hi), out_range=(lo, hi), padding=1).relu()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_all_levels(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run_level, backend=counter, fullgraph=True)
    weight, bias = torch.randn(40, 40, 3, 3, requires_grad=True), torch.randn(40)
    counts = []
    for lo, hi in levels_of(weight):
        x = torch.randn(2, hi - lo, 6, 7, requires_grad=True)
        got = compiled(x, weight, bias, lo, hi)
        want = run_level(x, weight, bias, lo, hi)
        torch.testing.assert_close(got, want)
        grad_y = torch.randn_like(want)
        for g, w in zip(
            torch.autograd.grad(got, (x, weight), grad_y),
            torch.autograd.grad(want, (x, weight), grad_y),
            strict=True,
        ):
            torch.testing.assert_close(g, w)
        counts.append(counter.frame_count)
    assert len(counts) == 10
    assert counts[-1] == counts[2], f"graphs compiled after each level: {counts}"


def test_exports_with_ranges():
    class Level(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3))
            self.register_buffer("ends", torch.tensor([2, 4, 6, 8]))

        def forward(self, x, level):
            end = self.ends[level].item()
            torch._check(end > 0)
            torch._check(end <= 8)
            return nested_conv2d(x, self.weight, out_range=(0, end), padding=1)

    module, x = Level(), torch.randn(2, 8, 5, 5)
    program = torch.export.export(module, (x, torch.tensor(1)))
    for level in range(4):
        got = program.module()(x, torch.tensor(level))
        torch.testing.assert_close(got, module(x, torch.tensor(level)))


def test_autocast_lowers_the_precision_and_keeps_float32_gradients():
    case = SMALL["range"]
    x, weight, bias = (t.requires_grad_() for t in case.tensors(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = nested_conv2d(x, weight, bias, **case.options())
        mixed = nested_conv2d(x.bfloat16(), weight, bias, **case.options())
    assert y.dtype == mixed.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().double() for t in (x, weight, bias)]
    assert_close(y, reference(*rounded, **case.options()), "y")
    grads = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)


def test_flops_are_counted():
    case = CASES["whole groups in the middle"]
    x, weight, bias = case.tensors(torch.float32)
    for t in (x, weight):
        t.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = nested_conv2d(x, weight, bias, **case.options())
        forward = counter.get_total_flops()
        y.sum().backward()
    n, out_channels, height, width = y.shape
    assert forward == 2 * n * out_channels * height * width * weight[0].numel()
    assert counter.get_total_flops() == 3 * forward


def test_works_under_functional_transforms():
    case = SMALL["range"]
    x, weight, bias = case.tensors(torch.float64)

    def loss(w):
        return nested_conv2d(x, w, bias, **case.options()).square().sum()

    grad = torch.func.grad(loss)(weight)
    leaf = weight.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(loss(leaf), leaf)[0])


def test_shapes_without_values():
    case = CASES["stride 2"]
    x, weight, bias = (t.to("meta") for t in case.tensors(torch.float32))
    y = nested_conv2d(x, weight, bias, **case.options())
    assert y.is_meta
    assert y.shape == (2, 10, 5, 4)


def test_is_deterministic():
    x, weight, bias = (
        t.requires_grad_() for t in Case(5, 33, 47, (13, 15), padding=1).tensors(torch.float32)
    )
    for backend in ("torch", "cpp"):
        with pyeff.backend(backend):
            runs = []
            for _ in range(2):
                y = nested_conv2d(x, weight, bias, padding=1)
                runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)
