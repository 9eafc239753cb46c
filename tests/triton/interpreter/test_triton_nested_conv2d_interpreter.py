import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from nested_cases import CASES, DEPTHWISE, GROUPS, INDEX, RANGE
from numerics import assert_close
from pyeff.triton_kernels import nested_conv2d as launchers
from pyeff.triton_kernels import nested_conv2d_depthwise
from pyeff.triton_kernels.tiles import Tile

pytestmark = pytest.mark.interpreter

HALVES = [torch.float16, torch.bfloat16]
KINDS = [RANGE, INDEX, GROUPS, DEPTHWISE]
SMALL = Tile(32, 16, 16, 1, 1)  # several programs in every direction, all of them ragged
COMBINATIONS = [(case, torch.float32) for case in CASES]
COMBINATIONS += [(case, dtype) for case in KINDS for dtype in HALVES]


def gradients(case, grad_y, x, weight, **options):
    selections, window = case.selections(), case.window()
    shares = {"shares": options.pop("shares", None)}
    grad_x = launchers.grad_input(grad_y, weight, x.shape, *selections, *window, **options)
    grad_w = launchers.grad_weight(
        grad_y, x, weight.shape, *selections, *window, **options, **shares
    )
    return grad_x, grad_w


def check(case, x, weight, bias, grad_y=None, **options):
    y = launchers.forward(
        x, weight, bias, *case.selections(), *case.window(), tile=options.get("tile")
    )
    expected = case.reference(x.double(), weight.double(), bias.double())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, f"{case}: y")
    grad_y = torch.randn_like(expected).to(x.dtype) if grad_y is None else grad_y
    grad_x, grad_w = gradients(case, grad_y, x, weight, **options)
    expected_x, expected_w = case.reference_gradients(grad_y, x, weight)
    assert_close(grad_x, expected_x, f"{case}: grad_x")
    assert_close(grad_w, expected_w, f"{case}: grad_weight")
    assert (grad_w[expected_w == 0] == 0).all()


@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS, ids=str)
def test_forward_and_gradients(case, dtype):
    check(case, *case.tensors(dtype))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_many_small_programs_and_shares(case):
    check(case, *case.tensors(torch.float32), tile=SMALL, shares=3)


@pytest.mark.parametrize("case", [RANGE, DEPTHWISE], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "slices", "expanded gradient"])
def test_layouts(case, layout):
    x, weight, bias = case.tensors(torch.float32)
    shape = case.reference(x, weight, bias).shape
    grad_y = torch.randn(shape)
    if layout == "channels_last":
        x, weight, grad_y = (
            t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad_y)
        )
    elif layout == "slices":
        x = torch.randn(x.shape[0], x.shape[1] + 3, *x.shape[2:])[:, 2:-1]
        wide = torch.randn(weight.shape[0], 2 * weight.shape[1], *weight.shape[2:])
        weight, bias = wide[:, ::2], bias.repeat_interleave(2)[::2]
    else:
        grad_y = torch.randn(1, 1, 1, 1).expand(shape)
    check(case, x, weight, bias, grad_y)


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
def test_epilogue(case, with_bias, activation):
    x, weight, bias = case.tensors(torch.float32)
    bias = bias if with_bias else None
    y = launchers.forward(x, weight, bias, *case.selections(), *case.window(), activation)
    expected = case.reference(x.double(), weight.double(), bias.double() if with_bias else None)
    assert (expected < 0).any()
    assert_close(y, expected.relu() if activation else expected, "y")


@pytest.mark.parametrize("case", [RANGE, DEPTHWISE], ids=str)
def test_relu_keeps_nan(case):
    x, weight, bias = case.tensors(torch.float32)
    x[0] = float("nan")
    y = launchers.forward(x, weight, bias, *case.selections(), *case.window(), "relu")
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_empty_batch(case):
    x, weight, bias = case.tensors(torch.float32)
    x = x[:0]
    y = launchers.forward(x, weight, bias, *case.selections(), *case.window())
    assert y.shape == case.reference(x, weight, bias).shape
    grad_x, grad_w = gradients(case, y, x, weight)
    assert grad_x.shape == x.shape
    assert grad_w.shape == weight.shape
    assert (grad_w == 0).all()


@pytest.mark.parametrize("case", [RANGE, DEPTHWISE], ids=str)
def test_weight_gradient_repeats_bit_for_bit(case):
    x, weight, bias = case.tensors(torch.float32)
    grad_y = torch.randn(case.reference(x, weight, bias).shape)
    first, again = (gradients(case, grad_y, x, weight, tile=SMALL, shares=4)[1] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("case", [RANGE, DEPTHWISE], ids=str)
def test_wide_pixel_numbers(case, monkeypatch):
    monkeypatch.setattr(launchers, "INT32_MAX", 0)
    monkeypatch.setattr(nested_conv2d_depthwise, "INT32_MAX", 0)
    check(case, *case.tensors(torch.float32), tile=SMALL, shares=2)


@pytest.mark.parametrize("case", [RANGE, DEPTHWISE], ids=str)
def test_offsets_beyond_32_bits(case):
    """The third image begins 2**31 elements in, in zeros that are mapped when they are touched."""
    count = case.in_sel[1] - case.in_sel[0]
    storage = torch.from_numpy(np.zeros(2**31 + 4096, np.float16))
    x = storage.as_strided((3, count, 4, 5), (2**30, 1, 5 * count, count))
    x.copy_(torch.randn(x.shape))
    _, weight, bias = case.tensors(torch.float16)
    check(case, x, weight, bias)


def test_an_index_outside_of_the_layer_reads_and_writes_nothing():
    x, weight, _ = INDEX.tensors(torch.float32)
    weight = weight.requires_grad_(False)
    in_index, out_index = torch.tensor([7, -3, 12]), torch.tensor([0, 16, -1, 4, 2])
    window = INDEX.window()
    y = launchers.forward(x, weight, None, in_index, out_index, *window)
    inside = INDEX.reference(x, weight.clone(), None).shape
    grad_y = torch.randn(inside)
    grad_w = launchers.grad_weight(grad_y, x, weight.shape, in_index, out_index, *window)
    grad_x = launchers.grad_input(grad_y, weight, x.shape, in_index, out_index, *window)
    assert (y[:, [1, 2]] == 0).all()
    assert (y[:, [0, 3, 4]] != 0).any()
    assert (grad_x[:, [1, 2]] == 0).all()
    assert (grad_x[:, 0] != 0).any()
    written = (grad_w != 0).any(dim=(2, 3)).nonzero().tolist()
    assert written == [[0, 7], [2, 7], [4, 7]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "float16, bfloat16 or float32 on the triton backend"),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'relu', got 'gelu'"),
        ({"precision": "tf16"}, ValueError, "precision must be 'tf32' or 'ieee', got 'tf16'"),
    ],
)
def test_errors(change, error, message):
    tensors = RANGE.tensors(change.pop("dtype", torch.float32))
    with pytest.raises(error, match=message):
        launchers.forward(*tensors, *RANGE.selections(), *RANGE.window(), **change)
