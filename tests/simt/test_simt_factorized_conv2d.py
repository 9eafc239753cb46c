"""factorized_conv2d's CUDA kernels on the host, against the float64 reference."""

import pytest
import torch
from numerics import assert_close
from ops.factorized_cases import ALL, CASES, HALVES, Case, random_case
from ops.test_factorized_conv2d import call, check

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

OPERATORS = ("factorized_conv2d",)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAIR, LINE = "factorized_pair_kernel", "factorized_line_kernel"
GRAD_WEIGHT, ADD = "factorized_line_grad_weight_kernel", "factorized_line_add_kernel"


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32, whatever this torch has from the start."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


def names(simt):
    return [launch["name"] for launch in simt.launches()]


def run(case, tensors):
    with pyeff.backend("cuda"), torch.no_grad():
        return call(factorized_conv2d, tensors, case.options())


def expected(case, tensors):
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    return call(reference, wide, case.options())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matches_reference(simt, name, dtype):
    check(CASES[name], dtype, "cpu", "cuda")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_matches_reference_in_half_precision(simt, name, dtype):
    check(CASES[name], dtype, "cpu", "cuda")


# Tiles that are ragged in both directions, several of them, and every width that there is.
TILED = {
    "several tiles, 16 channels": Case(2, 16, 16, 16, (23, 41), outer="relu", given=ALL),
    "several tiles, 3 to 64 channels": Case(1, 3, 40, 64, (11, 33), given=ALL),
    "several tiles, 128 channels": Case(1, 32, 96, 128, (9, 18), vertical_first=False, given=ALL),
    "comb of a dilation": Case(1, 16, 16, 16, (21, 26), dilation=4, inner="silu", given=ALL),
    "dilation beyond the image": Case(1, 8, 8, 8, (5, 6), dilation=16, given=ALL),
    "7 taps": Case(1, 8, 16, 8, (20, 19), 7, dilation=2, inner="hardswish"),
    "1 tap": Case(1, 16, 24, 8, (9, 15), 1, given=ALL),
    "valid, horizontal first": Case(
        1, 8, 16, 24, (9, 20), padding="valid", vertical_first=False, inner=None
    ),
    "padding above the kernel": Case(1, 8, 16, 24, (3, 4), padding=4, given=ALL, inner="relu6"),
}


# One kernel takes 64 channels in full precision.
FITTING = [
    (name, dtype)
    for name, case in TILED.items()
    for dtype in DTYPES
    if case.outputs <= 64 or dtype in HALVES
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "dtype"), FITTING, ids=str)
def test_one_kernel_computes_a_pair(simt, name, dtype, reverse):
    case = TILED[name]
    tensors = case.tensors(dtype)
    simt.set_reverse(reverse)
    y = run(case, tensors)
    assert names(simt) == [PAIR]
    assert y.permute(0, 2, 3, 1).is_contiguous()
    assert_close(y, expected(case, tensors), name, scale=4.0)


@pytest.mark.parametrize("name", ["several tiles, 128 channels", "comb of a dilation"])
def test_tf32_rounds_to_ten_bits(simt, name):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = TILED[name]
    tensors = case.tensors(torch.float32)
    want = expected(case, tensors)
    y = run(case, tensors)
    assert names(simt) == [PAIR]
    error = (y - want).abs().max()
    assert 1e-5 < error < 1e-2
    case = Case(1, 16, 160, 24, (6, 9), stride=2)
    tensors = case.tensors(torch.float32)
    simt.forget_launches()
    error = (run(case, tensors) - expected(case, tensors)).abs().max()
    assert names(simt) == [LINE, LINE]
    assert 1e-5 < error < 1e-2


def test_gradients_in_tf32(simt):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = Case(2, 20, 24, 12, (9, 13), inner="silu")
    tensors = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    with pyeff.backend("cuda"):
        y = call(factorized_conv2d, tensors, case.options())
        got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    wide = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    kept = [t.requires_grad_() for t in wide.values() if t is not None]
    want = call(reference, wide, case.options())
    expected_grads = torch.autograd.grad(want, kept, torch.ones_like(want))
    for g, w in zip(got, expected_grads, strict=True):
        assert ((g - w).abs().max() / w.abs().max()).item() < 5e-3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 16, 72, 130, (7, 9), stride=2, given=ALL),
        Case(1, 130, 136, 8, (5, 12), vertical_first=False, inner="silu", given=ALL, outer="silu"),
    ],
    ids=["stride", "many channels"],
)
def test_what_one_kernel_cannot_take_runs_as_two(simt, case, reverse):
    simt.set_reverse(reverse)
    for dtype in (torch.float16, torch.float32):
        tensors = case.tensors(dtype)
        simt.forget_launches()
        y = run(case, tensors)
        assert names(simt) == [LINE, LINE]
        assert_close(y, expected(case, tensors), str(dtype), scale=4.0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_weight_gradient_of_many_pixels_is_a_sum_of_parts(simt, dtype, reverse):
    simt.set_reverse(reverse)
    case = Case(2, 16, 8, 24, (25, 30), inner="relu", given=ALL)
    check(case, dtype, "cpu", "cuda")
    parts = [launch["grid"][1] for launch in simt.launches() if launch["name"] == GRAD_WEIGHT]
    assert len(parts) == 2
    assert min(parts) > 1
    assert names(simt).count(ADD) == 2


@pytest.mark.parametrize("layout", ["contiguous", "slice of channels_last", "slice of rows"])
@pytest.mark.parametrize("channels", [5, 16])
def test_layouts(simt, channels, layout):
    """Channels that can be copied 16 bytes at a time, by their number, lie at other addresses."""
    case = Case(2, channels, channels, channels, (6, 8), given=ALL, outer="relu")
    for dtype in (torch.float16, torch.float32):
        check(case, dtype, "cpu", "cuda", layout)


@pytest.mark.parametrize("block", range(3))
def test_random_problems(simt, block):
    for seed in range(200 + block * 8, 208 + block * 8):
        case, dtype = random_case(seed), DTYPES[seed % 4]
        check(case, dtype, "cpu", "cuda", what=f"{case}, {dtype}")


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bad_pixel_reaches_only_those_whose_taps_see_it(simt, stride):
    case = Case(1, 16, 16, 16, (7, 9), stride=stride)
    tensors = case.tensors(torch.float16)
    tensors["x"][0, 2, 4, 4] = float("nan")
    bad = run(case, tensors).isnan()[0].any(0)
    assert torch.equal(bad, expected(case, tensors).isnan()[0].any(0))
    assert bad.any()
    assert not bad.all()


def test_vectors_may_be_float32(simt):
    """As a folded norm's are, beside maps in half precision."""
    case = Case(1, 8, 8, 8, (6, 8), given=ALL)
    tensors = case.tensors(torch.float16)
    want = expected(case, tensors)
    x, y = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (tensors["x"], torch.empty(want.shape, dtype=torch.float16))
    )
    wide = {name: tensors[name].float() for name in ("b_first", "b_second", "scale", "shift")}
    vectors = wide["b_second"], wide["scale"], wide["shift"]
    weights = tensors["w_first"], tensors["w_second"]
    problem = (1, 1, 1, 1, 0, 0, 1)
    simt.factorized_conv2d_forward_cuda(
        x, weights[0], wide["b_first"], weights[1], *vectors, None, y, problem
    )
    want = want - tensors["residual"].double()
    assert_close(y, want, "y", scale=4.0)
    with pytest.raises(ValueError, match="scale must have the dtype of x or be float32"):
        simt.factorized_conv2d_line_forward_cuda(
            x, weights[0], None, wide["scale"].double(), None, None, y, True, problem
        )


def test_results_repeat_bit_for_bit(simt):
    case = Case(2, 16, 16, 16, (13, 17), given=ALL)
    tensors = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    results = []
    for reverse in (False, True):
        simt.set_reverse(reverse)
        with pyeff.backend("cuda"):
            y = call(factorized_conv2d, tensors, case.options())
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


def test_launches_have_the_current_stream_and_device(simt):
    check(CASES["stride 2"], torch.float32, "cpu", "cuda")
    assert set(names(simt)) == {LINE, GRAD_WEIGHT, ADD}
    assert {(launch["stream"], launch["device"]) for launch in simt.launches()} == {(0x517, 0)}
    assert max(launch["shared_bytes"] for launch in simt.launches()) <= 99 * 1024


def test_maps_too_large_for_32_bits_are_refused(simt):
    vast = torch.empty(1, dtype=torch.float16).expand(2**15, 1, 2**8, 2**7)
    weight, problem = torch.empty(1, 1, 3, 1, dtype=torch.float16), (1, 1, 1, 0, 0, 0, 1)
    message = "factorized_conv2d_line: backend cuda: x must have fewer than 2\\^30 pixels"
    with pytest.raises(NotImplementedError, match=message):
        simt.factorized_conv2d_line_forward_cuda(
            vast, weight, None, None, None, None, vast, True, problem
        )


def test_errors_of_the_binding(simt):
    x = torch.zeros(1, 8, 5, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    vertical, horizontal = (torch.zeros(8, 8, *k, dtype=torch.float16) for k in ((3, 1), (1, 3)))
    many, problem = torch.zeros(200, 8, 3, 1, dtype=torch.float16), (1, 1, 1, 0, 0, 0, 1)
    none = (None, None, None)
    with pytest.raises(ValueError, match="w_first must be 1 x n"):
        simt.factorized_conv2d_line_forward_cuda(x, vertical, None, *none, x, False, problem)
    with pytest.raises(ValueError, match="n x 1 and 1 x n, in either order"):
        simt.factorized_conv2d_forward_cuda(x, vertical, None, vertical, None, *none, x, problem)
    with pytest.raises(NotImplementedError, match="one kernel cannot run this pair; use two lines"):
        simt.factorized_conv2d_forward_cuda(
            x, many, None, horizontal.expand(8, 8, 1, 3)[:, :1].expand(8, 200, 1, 3), None, *none,
            x, problem,
        )  # fmt: skip
    elements = simt.factorized_conv2d_partial_elements_cuda(x, vertical, problem)
    partial = torch.zeros(elements, dtype=torch.float64)
    with pytest.raises(ValueError, match="partial must be float32, or float64 for float64 maps"):
        simt.factorized_conv2d_line_grad_weight_cuda(x, x, vertical, partial, True, problem)
    with pytest.raises(ValueError, match="partial must have shape"):
        simt.factorized_conv2d_line_grad_weight_cuda(
            x, x, vertical, partial[:1].float(), True, problem
        )


def test_a_build_without_cuda_says_so():
    from pyeff import _C

    if _C.cuda_info()["built"]:
        pytest.skip("this build has CUDA")
    x = torch.zeros(1, 8, 5, 6)
    with pytest.raises(RuntimeError, match="factorized_conv2d: backend cuda is not in this build"):
        _C.factorized_conv2d_forward_cuda(
            x.contiguous(memory_format=torch.channels_last), torch.zeros(8, 8, 3, 1), None,
            torch.zeros(8, 8, 1, 3), None, None, None, None,
            x.contiguous(memory_format=torch.channels_last), (1, 1, 1, 0, 0, 0, 1),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pixels_that_overlap_are_read_one_by_one(simt, dtype):
    """Channels side by side, but a pixel begins one element behind the other: nothing is wide."""
    wave = torch.randn(2, 96).to(dtype)
    x = wave.unfold(-1, 64, 1).transpose(1, 2)[:, :, None]
    assert x.stride()[1:] == (1, x.stride(2), 1)
    first, second = ((torch.randn(64, 64, *k) / 14).to(dtype) for k in ((3, 1), (1, 3)))
    with pyeff.backend("cuda"), torch.no_grad():
        y = factorized_conv2d(x, first, None, second, None)
    wide = reference(x.double(), first.double(), None, second.double(), None)
    assert_close(y, wide, "y", scale=2)


def test_weights_that_change_unseen_are_read(simt):
    """No copy of a weight is kept: the replay of a CUDA graph raises no version."""
    case = Case(1, 8, 8, 8, (5, 6))
    tensors = case.tensors(torch.float32)
    for _ in range(3):
        tensors["w_first"].data.mul_(2)
        assert_close(run(case, tensors), expected(case, tensors), "y", scale=8)
