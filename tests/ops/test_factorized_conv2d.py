import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from numerics import assert_close, in_layout
from ops.factorized_cases import ALL, CASES, Case, random_case

import pyeff
from pyeff.ops import _factorized_backends as backends
from pyeff.ops import _factorized_choice as choice
from pyeff.ops import _factorized_cpp as cpp
from pyeff.ops import factorized_conv2d
from pyeff.ops._dispatch import winograd_allowed
from pyeff.ops._factorized_pair import FactorPair
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

ISAS = pyeff.info()["isas"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "slice of channels_last", "slice of rows", "transposed"]
ROUTES = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton", "cuda")
]
# A middle map in half precision is rounded too, and the composition rounds after each step.
ROUNDINGS = {torch.float64: 1.0, torch.float32: 2.0, torch.bfloat16: 4.0, torch.float16: 4.0}
# Winograd's F(4, 3) in float32 adds and subtracts weighted inputs: its error is some times that of
# a direct sum.
WINOGRAD = 4.0
FORMS = [choice.Form(name, winograd) for name in ("fused", "two") for winograd in (False, True)]
public = sys.modules["pyeff.ops.factorized_conv2d"]


def call(function, tensors, options):
    first, second = ("w_first", "b_first"), ("w_second", "b_second")
    given = [tensors[name] for name in ("x", *first, *second)]
    rest = {name: tensors[name] for name in ("scale", "shift", "residual")}
    return function(*given, **rest, **options)


def check(case, dtype, device, backend, layout="channels_last", what=""):
    """Value and every gradient of one problem against the float64 reference."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take float16, bfloat16 and float32")
    tensors = case.tensors(dtype, device)
    for name in ("x", "residual"):
        if tensors[name] is not None:
            tensors[name] = in_layout(tensors[name], layout)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}
    wide = {
        k: None if t is None else t.detach().double().requires_grad_() for k, t in tensors.items()
    }
    want = call(reference, wide, case.options())
    grad_y = case.values(want.shape, dtype, device)
    winograd = dtype == torch.float32 and backend in ("cpp", None) and winograd_allowed()
    scale = ROUNDINGS[dtype] * (WINOGRAD if winograd else 1.0)
    with pyeff.backend(backend) if backend else nullcontext():
        y = call(factorized_conv2d, tensors, case.options())
        assert y.dtype == dtype
        assert y.shape == want.shape == (case.n, case.outputs, *case.output_size())
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert_close(y, want, f"{what} y", scale=scale)
        with torch.no_grad():
            for _ in range(3):  # the weights are read in place at first, packed later
                again = call(factorized_conv2d, tensors, case.options())
            assert_close(again, want, f"{what} y without gradients", scale=scale)
        got = torch.autograd.grad(y, list(leaves.values()), grad_y)
    want_grads = torch.autograd.grad(want, [wide[name] for name in leaves], grad_y.double())
    pixels = max(1, case.n * y.shape[2] * y.shape[3])
    for name, g, w in zip(leaves, got, want_grads, strict=True):
        assert g.shape == w.shape, name
        sums = 1.0 if name in ("x", "residual") else pixels**0.5
        assert_close(g, w, f"{what} gradient of {name}", scale=4 * scale * sums)


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
def test_direct_sums_match_reference_more_tightly(isa):
    with pyeff.isa(isa), pyeff.winograd(False):
        for name, case in CASES.items():
            check(case, torch.float32, "cpu", "cpp", what=f"{name}, direct")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", range(3))
def test_random_problems(isa, block):
    with pyeff.isa(isa):
        for seed in range(block * 25, block * 25 + 25):
            dtype = DTYPES[seed % 4]
            check(random_case(seed), dtype, "cpu", "cpp", what=f"{random_case(seed)}, {dtype}")


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_random_problems_elsewhere(backend):
    for seed in range(100, 130):
        dtype = DTYPES[seed % 4]
        check(random_case(seed), dtype, "cpu", backend, what=f"{random_case(seed)}, {dtype}")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_matches_reference(form, monkeypatch):
    """Whatever the model of their times would choose."""

    def chosen(backend, x, w_first, w_second, pair):
        possible = choice.estimates(x, w_first, w_second, pair)
        return form if form in possible else choice.Form("fused", False)

    # Calls are remembered with their forms.
    monkeypatch.setattr(backends, "forward_form", chosen)
    monkeypatch.setattr(public, "_known", public.KnownCalls())
    for name, case in CASES.items():
        check(case, torch.float32, "cpu", "cpp", what=name)
        check(case, torch.bfloat16, "cpu", "cpp", what=name)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["everything", "stride 2"])
def test_accepts_any_layout(name, layout, backend):
    check(CASES[name], torch.float32, "cpu", backend, layout)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_expanded_and_strided_tensors(backend):
    case = CASES["everything"]
    tensors = case.tensors(torch.float64)
    tensors["residual"] = torch.randn(1, 7, 1, 1, dtype=torch.float64).expand(2, 7, 6, 8)
    tensors["x"] = torch.randn(1, 5, 6, 8, dtype=torch.float64).expand(2, 5, 6, 8)
    tensors["w_first"] = tensors["w_first"].repeat_interleave(2, 1)[:, ::2]
    tensors["w_second"] = tensors["w_second"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["scale"] = torch.randn(1, dtype=torch.float64).expand(7)
    tensors["b_first"] = tensors["b_first"].repeat_interleave(2)[::2]
    want = call(reference, tensors, case.options())
    with pyeff.backend(backend):
        for _ in range(3):
            assert_close(call(factorized_conv2d, tensors, case.options()), want, "y")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_residual_may_be_the_input(backend):
    case = Case(2, 6, 5, 6, outer="relu")
    tensors = case.tensors(torch.float64)
    tensors["residual"] = tensors["x"].requires_grad_()
    wide = tensors["x"].detach().clone().requires_grad_()
    want = call(reference, {**tensors, "x": wide, "residual": wide}, case.options())
    with pyeff.backend(backend):
        y = call(factorized_conv2d, tensors, case.options())
        assert_close(y, want, "y")
        grad_y = torch.randn_like(want)
        (got,) = torch.autograd.grad(y, tensors["x"], grad_y)
    assert_close(got, torch.autograd.grad(want, wide, grad_y)[0], "gradient")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("everything", "dilated", "stride 2, horizontal first", "wide rows"):
            check(CASES[name], torch.float32, "cpu", "cpp", what=f"{name}, {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "direct", "most"), [(torch.float32, 1e-6, 5e-6), (torch.bfloat16, 8e-3, 1.6e-2)]
)
def test_winograd_can_be_turned_off(dtype, direct, most):
    case = Case(1, 64, 64, 64, (16, 32), inner=None, given=())
    tensors = case.tensors(torch.float32)
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    want = call(reference, wide, case.options())
    errors = {}
    for allowed in (True, False):
        with pyeff.winograd(allowed), pyeff.backend("cpp"):
            y = call(factorized_conv2d, tensors, case.options())
        errors[allowed] = ((y - want).abs().max() / want.abs().max()).item()
    assert errors[False] < direct
    assert errors[True] < most
    if dtype == torch.float32:  # in bfloat16 some processors have only direct sums
        assert errors[False] < errors[True]


def test_recorded_forwards_in_bfloat16_are_direct():
    case = Case(1, 64, 64, 64, (8, 16), given=())
    tensors = {
        name: None if t is None else t.bfloat16() for name, t in case.tensors(torch.float32).items()
    }
    with pyeff.backend("cpp"):
        with pyeff.winograd(False):
            direct = call(factorized_conv2d, tensors, case.options())
        tensors["w_first"].requires_grad_()
        assert torch.equal(call(factorized_conv2d, tensors, case.options()), direct)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vertical_first", [True, False])
def test_winograd_in_bfloat16(isa, vertical_first):
    """Numbers that are rounded, against the direct form; channels of no multiple of anything."""
    for channels, middle, outputs in ((64, 64, 64), (5, 33, 7), (40, 16, 70)):
        for dilation in (1, 3):
            case = Case(
                2, channels, middle, outputs, (11, 13), dilation=dilation, given=ALL, outer="silu"
            )
            case = replace(case, vertical_first=vertical_first)
            tensors = {n: t.bfloat16() for n, t in case.tensors(torch.float32).items()}
            wide = {name: t.double() for name, t in tensors.items()}
            want = call(reference, wide, case.options())
            pair = FactorPair(1, dilation, dilation, "relu", "silu")
            form = choice.Form("fused", winograd=True)
            with pyeff.isa(isa):
                run = cpp.cpp_call(
                    tensors["x"], tensors["w_first"], tensors["w_second"], pair, form
                )
                for recording in (True, False, False):  # packed for the call, and kept
                    y = cpp.forward(run, *tensors.values(), recording=recording)
                    error = (y - want).abs().max() / want.abs().max()
                    assert error < 2e-2, (channels, dilation)


def test_packed_weights_follow_every_change():
    case = CASES["erfnet, 64 channels"]
    tensors = case.tensors(torch.float32)

    def check_now(what):
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        with torch.no_grad(), pyeff.backend("cpp"):
            for allowed in (True, True, True, False, False, True):
                with pyeff.winograd(allowed):
                    y = call(factorized_conv2d, tensors, case.options())
                want = call(reference, wide, case.options())
                assert_close(y, want, what, scale=WINOGRAD)

    check_now("at first")
    for name in ("w_first", "w_second"):
        tensors[name].mul_(-1)
        check_now(f"{name} negated")
        tensors[name].set_(tensors[name].flip(0))
        check_now(f"{name} set")
        pyeff.clear_packed(tensors[name])
        check_now(f"{name} cleared")


def test_is_deterministic():
    case = CASES["everything"]
    tensors = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for backend in ("torch", "cpp"):
        with pyeff.backend(backend):
            runs = []
            for _ in range(2):
                y = call(factorized_conv2d, tensors, case.options())
                runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("outer", [None, "relu", "silu"])
def test_the_middle_map_is_not_kept(outer):
    case = Case(1, 4, 50, 4, outer=outer, given=ALL)
    tensors = case.tensors(torch.float32)
    for t in tensors.values():
        t.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call(factorized_conv2d, tensors, case.options())
    mine = {t.data_ptr() for t in (*tensors.values(), y)}
    assert {t.data_ptr() for t in kept} <= mine
    assert (y.data_ptr() in {t.data_ptr() for t in kept}) == (outer == "relu")
    assert (tensors["residual"].data_ptr() in {t.data_ptr() for t in kept}) == (outer == "silu")


def test_the_model_prefers_what_measurements_prefer():
    """Each row is a shape on which the forms differ clearly on the table's device."""
    pair = FactorPair(1, 1, 1, "relu", None)
    for channels, winograd in ((16, False), (32, True), (64, True), (256, True)):
        x = torch.empty(1, channels, 64, 128)
        first, second = torch.empty(channels, channels, 3, 1), torch.empty(channels, channels, 1, 3)
        assert choice.forward_form("cpp", x, first, second, pair) == ("fused", winograd)
        if channels != 32:  # where there is little between the two in bfloat16
            halves = (t.bfloat16() for t in (x, first, second))
            assert choice.forward_form("cpp", *halves, pair) == ("fused", winograd)
    first, second = torch.empty(512, 512, 3, 1), torch.empty(512, 512, 1, 3)
    form = choice.forward_form("cpp", torch.empty(1, 512, 7, 7), first, second, pair)
    assert form.name == "two", "weights beyond the cache"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_come_from_the_backend_that_the_table_names(dtype, monkeypatch):
    """ATen in bfloat16, where it was measured to be faster; the numbers hold in either case."""
    calls = []
    for name, module in (("torch", backends.aten), ("cpp", backends)):
        attribute = "backward" if name == "torch" else "cpp_backward"
        whole = getattr(module, attribute)
        monkeypatch.setattr(
            module, attribute, lambda *a, name=name, whole=whole: calls.append(name) or whole(*a)
        )
    for case in (CASES["everything"], CASES["stride 2, horizontal first"]):
        check(case, dtype, "cpu", None)
    assert set(calls) == {"torch" if dtype == torch.bfloat16 else "cpp"}
    calls.clear()
    check(CASES["everything"], dtype, "cpu", "cpp")
    assert set(calls) == {"cpp"}, "a forced backend is used whatever the table says"
