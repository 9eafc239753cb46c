import os

import pytest
import torch
from numerics import assert_close
from ops.factorized_cases import ALL, CASES, Case
from ops.test_factorized_conv2d import call, check

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from pyeff.triton_kernels import factorized_conv2d as launchers
from pyeff.triton_kernels.tiles import TILES, arithmetic, device_limits

pytestmark = pytest.mark.gpu

ERFNET = {
    "16 channels": Case(2, 16, 16, 16, (64, 96), outer="relu", given=ALL),
    "64 channels": Case(1, 64, 64, 64, (48, 80), outer="relu", given=ALL),
    "128, dilation 16": Case(1, 128, 128, 128, (64, 96), dilation=16, given=ALL),
    "horizontal first": Case(1, 64, 64, 64, (48, 80), vertical_first=False, dilation=4),
}


@pytest.mark.parametrize("name", ERFNET)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_erfnets_pairs_match_reference(name, dtype):
    check(ERFNET[name], dtype, "cuda", "triton")


@pytest.mark.parametrize("precision", ["tf32", "ieee", "half"])
def test_every_tile_of_the_fused_kernel(precision):
    dtype = torch.float16 if precision == "half" else torch.float32
    case = ERFNET["64 channels"]
    tensors = case.tensors(dtype, "cuda")
    wide = {name: t.double() for name, t in tensors.items()}
    want = call(reference, wide, case.options())
    epilogue = [tensors[name] for name in ("b_second", "scale", "shift", "residual")]
    epilogue = launchers.Epilogue(*epilogue, "relu")
    first = [tensors[name] for name in ("x", "w_first", "b_first", "w_second")]
    kind = arithmetic(dtype, "tf32" if precision == "tf32" else "ieee")
    architecture = device_limits(tensors["x"].device).architecture
    for tile in TILES["pair", architecture][kind]:
        for segment in (1, 5, None):
            options = dict(fused=True, tile=tile, segment=segment)
            asked = "ieee" if precision == "half" else precision
            y = launchers.forward(*first, epilogue, (1, 1, 1), "relu", asked, **options)
            if precision == "tf32":
                torch.testing.assert_close(y.double(), want, rtol=8e-3, atol=3e-2)
            else:
                assert_close(y, want, f"{tile}, {segment}", scale=4.0)


def test_nothing_waits_for_the_device():
    tensors = ERFNET["64 channels"].tensors(torch.float16, "cuda")
    for t in tensors.values():
        t.requires_grad_()

    def run():
        y = call(factorized_conv2d, tensors, {"outer": "relu"})
        return torch.autograd.grad(y.sum(), list(tensors.values()))

    with pyeff.backend("triton"):
        run()  # compiling may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_results_repeat_bit_for_bit():
    case = CASES["everything"]
    tensors = case.tensors(torch.float32, "cuda")
    with pyeff.backend("triton"):
        first, again = (call(factorized_conv2d, tensors, case.options()) for _ in range(2))
    assert torch.equal(first, again)
