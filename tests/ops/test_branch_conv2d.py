import pytest
import torch
from numerics import assert_close
from ops.branch_cases import CASES, Case, random_case

import pyeff
from pyeff.ops import Routes, branch_conv2d
from pyeff.ops._conv_args import padding_sides, pair
from pyeff.reference.branch_conv2d import branch_conv2d as reference

ISAS = pyeff.info()["isas"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels innermost", "slice of channels", "slice of rows", "transposed"]
ROUTES = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton", "cuda")
]


def in_layout(t, layout):
    """``t`` [..., C, H, W] with the same values and other strides."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    innermost = t.movedim(-3, -1)
    if layout == "slice of channels":
        wide = torch.cat([torch.full_like(innermost, 7.0), innermost], -1)
        return wide[..., t.shape[-3] :].movedim(-1, -3)
    if layout == "slice of rows":
        tall = torch.cat([torch.full_like(innermost, 7.0), innermost], -3)
        return tall[..., t.shape[-2] :, :, :].movedim(-1, -3)
    return innermost.contiguous().movedim(-1, -3)


def is_innermost(y):
    return y.movedim(-3, -1).is_contiguous()


def expected(case, x, weight, bias, index):
    """The reference in float64, and the leaves that it was fed."""
    options = case.options()
    if isinstance(case.padding, str):
        stride, dilation = pair("t", "s", case.stride, 1), pair("t", "d", case.dilation, 1)
        options["padding"] = padding_sides("t", case.padding, case.kernel, stride, dilation)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    return reference(*wide, index, **options), [t for t in wide if t is not None]


def check(case, dtype, device, backend, layout="channels innermost", what=""):
    """Value and every gradient of one problem against the float64 reference."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take float16, bfloat16 and float32")
    x, weight, bias = case.tensors(dtype, device)
    index = case.routes(device)
    x = in_layout(x, layout)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    want, wide = expected(case, x, weight, bias, index)
    grad_y = torch.randn_like(want).to(dtype)
    with pyeff.backend(backend):
        y = branch_conv2d(x, weight, bias, index, **case.options())
        assert y.dtype == dtype
        assert y.shape == want.shape
        assert y.numel() == 0 or is_innermost(y)
        assert_close(y, want, f"{what} y")
        with torch.no_grad():
            for _ in range(3):  # the weight is read in place at first, packed later
                again = branch_conv2d(x, weight, bias, index, **case.options())
            assert_close(again, want, f"{what} y without gradients")
        got = torch.autograd.grad(y, leaves, grad_y)
    want_grads = torch.autograd.grad(want, wide, grad_y.double())
    uses = index.shape[1] * (x.shape[0] if case.shared else 1)
    pixels = max(1, uses * y.shape[3] * y.shape[4])
    never = torch.ones(case.branches, dtype=torch.bool)
    never[index.flatten().long().cpu()] = False
    for name, g, w in zip(("x", "weight", "bias"), got, want_grads, strict=False):
        assert g.shape == w.shape
        scale = index.shape[1] ** 0.5 if name == "x" else pixels**0.5
        assert_close(g, w, f"{what} gradient of {name}", scale=4 * scale)
        if name != "x":
            assert not g[never].any(), f"{what} gradient of {name}: branches that nobody took"


@pytest.mark.parametrize(("device", "backend"), ROUTES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matches_reference(case, dtype, device, backend):
    check(case, dtype, device, backend)


@pytest.mark.parametrize(("device", "backend"), ROUTES)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_matches_reference_in_half_precision(dtype, device, backend):
    for name, case in CASES.items():
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
        for seed in range(block * 40, block * 40 + 40):
            check(random_case(seed), torch.float32, "cpu", "cpp", what=f"{random_case(seed)}")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cifar branch", "cifar branch, pairs", "depth-wise"])
def test_accepts_any_layout(name, layout, backend):
    check(CASES[name], torch.float32, "cpu", backend, layout)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("cifar branch", "cifar branch, pairs", "one image", "depth-wise"):
            check(CASES[name], torch.float32, "cpu", "cpp", what=f"{name}, {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_index_of_any_kind(backend):
    case = CASES["cifar branch"]
    x, weight, bias = case.tensors(torch.float32)
    index = case.routes()
    want, _ = expected(case, x, weight, bias, index)
    routes = Routes(index, torch.ones(index.shape))
    for given in (index.long(), index.t().contiguous().t(), routes, index.repeat(1, 2)[:, ::2]):
        with pyeff.backend(backend):
            y = branch_conv2d(x, weight, bias, given, **case.options())
        if given is not routes and given.stride(1) == 2:
            want, _ = expected(case, x, weight, bias, given)
        assert_close(y, want, "y")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_row_is_conv2d_with_its_branch(backend):
    case = Case(4, 3, 6, padding=1, stride=2)
    x, weight, bias = case.tensors(torch.float64)
    index = case.routes()
    with pyeff.backend(backend):
        y = branch_conv2d(x, weight, bias, index, **case.options())
    for n in range(4):
        for j in range(3):
            b = int(index[n, j])
            row = torch.nn.functional.conv2d(x[n], weight[b], bias[b], stride=2, padding=1)
            torch.testing.assert_close(y[n, j], row)


def test_weight_of_any_strides():
    case = CASES["cifar branch"]
    x, weight, bias = case.tensors(torch.float32)
    index = case.routes()
    want, _ = expected(case, x, weight, bias, index)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    with pyeff.backend("cpp"), torch.no_grad():
        for _ in range(3):
            assert_close(branch_conv2d(x, turned, bias, index, **case.options()), want, "y")


def test_packed_weight_follows_every_change_of_the_weight():
    case = CASES["cifar branch"]
    x, weight, bias = case.tensors(torch.float32)
    index = case.routes()

    def check_now(what):
        with torch.no_grad(), pyeff.backend("cpp"):
            for _ in range(3):
                y = branch_conv2d(x, weight, bias, index, **case.options())
        assert_close(y, expected(case, x, weight, bias, index)[0], what)

    check_now("at first")
    weight.mul_(2)
    check_now("scaled")
    weight.set_(torch.randn_like(weight) / 12)
    check_now("set")
    pyeff.clear_packed(weight)
    check_now("cleared")


def test_one_weight_serves_several_numbers_of_groups():
    weight = torch.randn(4, 8, 6, 3, 3) / 7
    index = torch.tensor([[0, 3], [2, 1]])
    for _ in range(3):
        for groups in (1, 2):
            x = torch.randn(2, 6 * groups, 5, 5)
            want = reference(x.double(), weight.double(), None, index, groups=groups)
            with torch.no_grad(), pyeff.backend("cpp"):
                for _ in range(3):
                    y = branch_conv2d(x, weight, None, index, groups=groups)
            assert_close(y, want, f"{groups} groups")


def test_is_deterministic():
    case = Case(6, 3, 4, 33, 47, (9, 7), padding=1)
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32)]
    index = case.routes()
    for backend in ("torch", "cpp"):
        with pyeff.backend(backend):
            runs = []
            for _ in range(2):
                y = branch_conv2d(*tensors, index, padding=1)
                runs.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)
