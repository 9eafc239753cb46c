import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from branch_conv2d_cases import CASES, DEPTHWISE, GROUPS, PER_PAIR, SHARED, WANTED
from numerics import assert_close
from pyeff.triton_kernels import branch_conv2d as launchers
from pyeff.triton_kernels.tiles import Tile
from pyeff.triton_kernels.top_k_routes import branch_plan

pytestmark = pytest.mark.interpreter

HALVES = [torch.float16, torch.bfloat16]
SMALL = Tile(8, 4, 16, 1, 1)  # several programs in every direction, most of them ragged
COMBINATIONS = [(case, torch.float32) for case in CASES]
COMBINATIONS += [(case, dtype) for case in (SHARED, DEPTHWISE) for dtype in HALVES]


def gradients(case, grad_y, x, weight, index, **options):
    """Gradients of x, weight and bias."""
    shares = {"shares": options.pop("shares", None)}
    window = case.window()
    return (
        launchers.grad_input(grad_y, weight, x.shape, index, *window, **options),
        launchers.grad_weight(grad_y, x, weight.shape, index, *window, **options, **shares),
        launchers.grad_bias(grad_y, index, weight.shape[0]),
    )


def check(case, x, weight, bias, index, grad_y=None, **options):
    y = launchers.forward(x, weight, bias, index, *case.window(), tile=options.get("tile"))
    expected = case.reference(x, weight, bias, index)
    assert y.movedim(2, -1).is_contiguous()  # channels innermost
    assert_close(y, expected, f"{case}: y")
    grad_y = torch.randn_like(expected).to(x.dtype) if grad_y is None else grad_y
    got = gradients(case, grad_y, x, weight, index, **options)
    want = case.reference_gradients(grad_y, x, weight, bias, index)
    for name, actual, right in zip(WANTED, got, want, strict=True):
        assert_close(actual, right, f"{case}: gradient of {name}", scale=4.0)
    for actual, right in zip(got[1:], want[1:], strict=True):
        assert actual.is_contiguous()
        assert (actual[right == 0] == 0).all(), "branches that nobody chose"


@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS, ids=str)
def test_forward_and_gradients(case, dtype):
    check(case, *case.tensors(dtype))


@pytest.mark.parametrize("case", [SHARED, GROUPS, DEPTHWISE], ids=str)
def test_many_small_programs_and_shares(case):
    check(case, *case.tensors(torch.float32), tile=SMALL, shares=3)


@pytest.mark.parametrize("layout", ["channels innermost", "slices", "expanded gradient"])
def test_layouts(layout):
    case = PER_PAIR
    x, weight, bias, index = case.tensors(torch.float32)
    shape = case.reference(x, weight, bias, index).shape
    grad_y = torch.randn(shape)
    if layout == "channels innermost":
        x, weight, grad_y = (
            t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in (x, weight, grad_y)
        )
    elif layout == "slices":
        x = torch.randn(*x.shape[:2], x.shape[2] + 3, *x.shape[3:])[:, :, 2:-1]
        weight = torch.randn(*weight.shape[:2], 2 * weight.shape[2], *weight.shape[3:])[:, :, ::2]
        weight, bias = weight / 6, bias.repeat_interleave(2, dim=1)[:, ::2]
    else:
        grad_y = torch.randn(1, 1, 1, 1, 1).expand(shape)
    check(case, x, weight, bias, index, grad_y)


@pytest.mark.parametrize("order", [(2, 0, 1, 3, 4), (1, 0, 2, 3, 4), (4, 3, 2, 1, 0)], ids=str)
def test_a_gradient_in_any_order_of_memory(order):
    tensors = PER_PAIR.tensors(torch.float32)
    shape = PER_PAIR.reference(*tensors).shape
    grad_y = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(5)])
    check(PER_PAIR, *tensors, grad_y)


@pytest.mark.parametrize("case", [SHARED, DEPTHWISE], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
def test_epilogue(case, with_bias, activation):
    x, weight, bias, index = case.tensors(torch.float32)
    bias = bias if with_bias else None
    y = launchers.forward(x, weight, bias, index, *case.window(), activation)
    expected = case.reference(x, weight, bias, index)
    assert (expected < 0).any()
    assert_close(y, expected.relu() if activation else expected, "y")


@pytest.mark.parametrize("case", [SHARED, DEPTHWISE], ids=str)
def test_the_order_of_the_pairs_changes_nothing(case):
    x, weight, bias, index = case.tensors(torch.float32)
    window = case.window()
    plan = branch_plan(index, case.branches)
    assert plan.order.tolist() == [1, 0, 2, 3]
    as_they_come = launchers.forward(x, weight, bias, index, *window)
    assert torch.equal(launchers.forward(x, weight, bias, index, *window, plan=plan), as_they_come)
    grad_y = torch.randn_like(as_they_come)
    sizes = (grad_y, x, weight.shape, index, *window)
    assert torch.equal(launchers.grad_weight(*sizes, plan=plan), launchers.grad_weight(*sizes))
    sizes = (grad_y, index, case.branches)
    assert torch.equal(launchers.grad_bias(*sizes, plan=plan), launchers.grad_bias(*sizes))


def test_the_pairs_are_ordered_where_the_weights_overflow_the_cache():
    x, weight, bias, _ = SHARED.tensors(torch.float32)
    few, many = torch.tensor([[1], [0]]), torch.tensor([[1, 0, 2], [2, 1, 1]])
    plans = []

    def planned(index, branches):
        plans.append(index.numel())
        return branch_plan(index, branches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "branch_plan", planned)
        for index in (few, many):
            index = index.to(torch.int32)
            y = launchers.forward(x, weight, bias, index, *SHARED.window())
            assert_close(y, SHARED.reference(x, weight, bias, index), "y")
    assert plans == [6], "the interpreter's device has no cache; two pairs share nothing"


@pytest.mark.parametrize("case", [SHARED, PER_PAIR, DEPTHWISE], ids=str)
def test_empty_batch(case):
    x, weight, bias, index = case.tensors(torch.float32)
    x, index = x[:0], index[:0]
    y = launchers.forward(x, weight, bias, index, *case.window())
    assert y.shape == case.reference(x, weight, bias, index).shape
    grad_x, grad_w, grad_b = gradients(case, y, x, weight, index)
    assert grad_x.shape == x.shape
    assert grad_w.shape == weight.shape
    assert not grad_w.any()
    assert grad_b.shape == bias.shape
    assert not grad_b.any()


@pytest.mark.parametrize("case", [SHARED, DEPTHWISE], ids=str)
def test_gradients_repeat_bit_for_bit(case):
    x, weight, bias, index = case.tensors(torch.float32)
    grad_y = torch.randn(case.reference(x, weight, bias, index).shape)
    first, again = (gradients(case, grad_y, x, weight, index, shares=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", [SHARED, DEPTHWISE], ids=str)
def test_wide_pixel_numbers(case, monkeypatch):
    monkeypatch.setattr(launchers, "INT32_MAX", 0)
    check(case, *case.tensors(torch.float32), shares=2)


@pytest.mark.parametrize("case", [SHARED, DEPTHWISE], ids=str)
def test_offsets_beyond_32_bits(case):
    """The second image begins 2**31 elements in, in zeros that are mapped when they are touched."""
    channels, (height, width) = case.inputs, case.image
    storage = torch.from_numpy(np.zeros(2**31 + 4096, np.float16))
    x = storage.as_strided((2, channels, height, width), (2**31, 1, width * channels, channels))
    x.copy_(torch.randn(x.shape))
    _, weight, bias, index = case.tensors(torch.float16)
    check(case, x, weight, bias, index)


@pytest.mark.parametrize("case", [SHARED, PER_PAIR, DEPTHWISE], ids=str)
def test_a_route_to_no_branch_gives_zeros_and_takes_no_part(case):
    x, weight, bias, index = case.tensors(torch.float32)
    x[0] = float("nan")  # must not be read by the pairs without a branch
    index = torch.tensor([[-1, 2**31 - 1], [2, 3]], dtype=torch.int32)
    y = launchers.forward(x, weight, bias, index, *case.window())
    alone = index.clamp(0, 2)
    x = x.nan_to_num(1.0)
    expected = case.reference(x, weight, bias, alone)
    stays = torch.zeros(2, 2, 1, 1, 1)
    stays[1, 0] = 1
    assert_close(y, expected * stays, "y")
    grad_y = torch.randn(expected.shape)
    want = case.reference_gradients(grad_y * stays, x, weight, bias, alone)
    got = gradients(case, grad_y, x, weight, index)
    for name, actual, right in zip(WANTED, got, want, strict=True):
        assert_close(actual, right, f"gradient of {name}", scale=4.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "float16, bfloat16 or float32 on the triton backend"),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'relu', got 'gelu'"),
        ({"precision": "tf16"}, ValueError, "precision must be 'tf32' or 'ieee', got 'tf16'"),
    ],
)
def test_errors(change, error, message):
    tensors = SHARED.tensors(change.pop("dtype", torch.float32))
    with pytest.raises(error, match=f"branch_conv2d: .*{message}"):
        launchers.forward(*tensors, *SHARED.window(), **change)
