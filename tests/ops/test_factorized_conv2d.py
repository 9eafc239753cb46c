import pytest
import torch
from numerics import assert_close, in_layout
from ops.factorized_cases import CASES

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

ISAS = pyeff.info()["isas"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "slice of channels_last", "slice of rows", "transposed"]
ROUTES = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton")
]
# A middle map in half precision is rounded too, and the composition rounds after each step.
ROUNDINGS = {torch.float64: 1.0, torch.float32: 2.0, torch.bfloat16: 4.0, torch.float16: 4.0}
# Winograd's F(4, 3) in float32 adds and subtracts weighted inputs: its error is some times that of
# a direct sum.
WINOGRAD = 4.0


def call(function, tensors, options):
    first, second = ("w_first", "b_first"), ("w_second", "b_second")
    given = [tensors[name] for name in ("x", *first, *second)]
    rest = {name: tensors[name] for name in ("scale", "shift", "residual")}
    return function(*given, **rest, **options)


def check(case, dtype, device, backend, layout="channels_last", what="", winograd=False):
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
    scale = ROUNDINGS[dtype] * (WINOGRAD if winograd else 1.0)
    with pyeff.backend(backend):
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
