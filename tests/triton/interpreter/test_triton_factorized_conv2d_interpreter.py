import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from numerics import assert_close, in_layout
from ops.factorized_cases import ALL, CASES, Case
from ops.test_factorized_conv2d import call, check
from pyeff.triton_kernels import factorized_conv2d as launchers
from pyeff.triton_kernels.tiles import Tile

from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

pytestmark = pytest.mark.interpreter
whole = launchers._pair

SMALL = Tile(8, 4, 16, 1, 1)  # several programs in every direction, most of them ragged
FUSED = {
    "vertical first": Case(2, 5, 6, 7, (5, 8), outer="relu", given=ALL),
    "horizontal first": Case(2, 5, 6, 7, (5, 8), vertical_first=False, given=ALL),
    "dilated": Case(2, 5, 6, 7, (7, 11), dilation=3, inner="silu", given=ALL),
    "dilated, horizontal first": Case(
        1, 5, 6, 7, (9, 8), dilation=2, vertical_first=False, inner="hardswish", outer="silu"
    ),
    "dilation beyond the image": Case(1, 4, 5, 6, (5, 6), dilation=7, outer="relu6"),
    "valid": Case(1, 4, 20, 6, (6, 8), padding="valid", given=("scale",), inner=None),
    "padding above the kernel": Case(1, 4, 5, 18, (3, 4), padding=3, inner="relu6"),
}


def on_launcher(case, tensors, **options):
    names = ("b_second", "scale", "shift", "residual")
    epilogue = launchers.Epilogue(*(tensors[name] for name in names), case.outer)
    padding = {"same": case.dilation * (case.taps // 2), "valid": 0}.get(case.padding, case.padding)
    window = (case.stride, padding, case.dilation)
    first = tensors["x"], tensors["w_first"], tensors["b_first"], tensors["w_second"]
    return launchers.forward(*first, epilogue, window, case.inner, **options)


def expected(case, tensors):
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    return call(reference, wide, case.options())


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
def test_one_kernel_and_two_compute_the_same(case):
    tensors = case.tensors(torch.float32)
    want = expected(case, tensors)
    for fused in (True, False):
        y = on_launcher(case, tensors, fused=fused)
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert_close(y, want, f"fused: {fused}", scale=2.0)


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("segment", [1, 3])
def test_segments_of_any_length(case, segment):
    tensors = case.tensors(torch.float32)
    y = on_launcher(case, tensors, fused=True, tile=SMALL, segment=segment)
    assert_close(y, expected(case, tensors), "y", scale=2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_half_precision(fused, dtype):
    for name in ("vertical first", "dilated, horizontal first"):
        tensors = FUSED[name].tensors(dtype)
        y = on_launcher(FUSED[name], tensors, fused=fused)
        assert_close(y, expected(FUSED[name], tensors), name, scale=2.0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "erfnet" not in name])
def test_the_operator_matches_reference(name):
    check(CASES[name], torch.float32, "cpu", "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_operator_matches_reference_in_half_precision(dtype):
    for name in ("everything, horizontal first", "stride 2", "silu twice"):
        check(CASES[name], dtype, "cpu", "triton", what=name)


@pytest.mark.parametrize("layout", ["contiguous", "slice of channels_last", "slice of rows"])
def test_layouts(layout):
    check(CASES["everything"], torch.float32, "cpu", "triton", layout)


def test_inputs_of_any_strides():
    case = FUSED["vertical first"]
    tensors = case.tensors(torch.float32)
    want = expected(case, tensors)
    tensors["residual"] = in_layout(tensors["residual"], "transposed")
    tensors["x"] = in_layout(tensors["x"], "transposed")
    tensors["w_first"] = tensors["w_first"].repeat_interleave(2, 1)[:, ::2]
    tensors["w_second"] = tensors["w_second"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["scale"] = tensors["scale"].repeat_interleave(2)[::2]
    for fused in (True, False):
        assert_close(on_launcher(case, tensors, fused=fused), want, "y", scale=2.0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_pixel_reaches_only_those_whose_taps_see_it(fused):
    case = Case(1, 4, 5, 6, (7, 9))
    tensors = case.tensors(torch.float32)
    tensors["x"][0, 2, 3, 4] = float("nan")
    y = on_launcher(case, tensors, fused=fused)
    seen = torch.zeros(7, 9, dtype=torch.bool)
    seen[2:5, 3:6] = True
    assert torch.equal(y.isnan()[0].any(0), seen)


def test_results_repeat_bit_for_bit():
    case = FUSED["vertical first"]
    tensors = case.tensors(torch.float32)
    first, again = (on_launcher(case, tensors, fused=True) for _ in range(2))
    assert torch.equal(first, again)


def test_a_dilation_beyond_32_bits_times_a_few_is_no_address():
    """Where the fused kernel would count past 2^31, two kernels run."""
    near = Case(1, 4, 5, 6, (1, 2), dilation=16, given=ALL)
    tensors = near.tensors(torch.float32)
    case = replace(near, dilation=2**29)
    y = on_launcher(case, tensors, fused=True)
    assert_close(y, expected(near, tensors), "only the middle tap meets the image", scale=2.0)


@pytest.mark.parametrize("dilation", [1, 3])
def test_short_lines_are_not_fused(dilation, monkeypatch):
    forms = []
    monkeypatch.setattr(launchers, "_pair", lambda *a: forms.append("fused") or whole(*a))
    case = Case(1, 4, 5, 6, (2, 7), dilation=dilation)
    check(case, torch.float32, "cpu", "triton")
    assert bool(forms) == (dilation == 1)


def test_wide_pixel_numbers(monkeypatch):
    monkeypatch.setattr(launchers, "INT32_MAX", 0)
    for name in ("everything", "stride 2"):
        check(CASES[name], torch.float32, "cpu", "triton")


@pytest.mark.parametrize("vertical_first", [True, False])
def test_a_stride_beyond_the_map_launches_no_program_without_a_pixel(vertical_first, monkeypatch):
    """Programs of the gradients of maps: one class of pixels for each line that there is."""
    kernel, programs = launchers.factorized_line_grad_input_kernel, []

    class Counted:
        def __getitem__(self, grid):
            programs.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(launchers, "factorized_line_grad_input_kernel", Counted())
    case = Case(1, 4, 5, 6, (3, 2), stride=2000, vertical_first=vertical_first)
    check(case, torch.float32, "cpu", "triton")
    assert len(programs) == 2
    assert max(programs) <= 3


@pytest.mark.parametrize(
    ("case", "dtype", "error", "message"),
    [
        (Case(), torch.float64, TypeError, "float16, bfloat16 or float32 on the triton backend"),
        (Case(inner="gelu"), torch.float32, ValueError, "inner must be one of .*, got 'gelu'"),
        (Case(outer="gelu"), torch.float32, ValueError, "outer must be one of .*, got 'gelu'"),
        (Case(taps=5), torch.float32, ValueError, "fused must be False for weights"),
        (Case(stride=2), torch.float32, ValueError, "fused must be False .* with stride 2, got Tr"),
        (Case(middle=65), torch.float32, ValueError, "fused must be False for weights"),
    ],
)
def test_errors(case, dtype, error, message):
    with pytest.raises(error, match=f"factorized_conv2d: .*{message}"):
        on_launcher(case, case.tensors(dtype), fused=True)


def test_precision_is_one_of_two():
    with pytest.raises(ValueError, match="precision must be 'tf32' or 'ieee', got 'tf16'"):
        on_launcher(Case(), Case().tensors(torch.float32), fused=True, precision="tf16")
