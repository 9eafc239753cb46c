import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from numerics import assert_close
from pyeff.triton_kernels import combine as launchers
from pyeff.triton_kernels.tiles import Tile
from pyeff.triton_kernels.top_k_routes import branch_plan

from pyeff.reference.combine import combine as reference

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDEX = ((2, 0), (2, 2), (0, 5))  # a branch twice; nobody takes 1, 3 and 4


def problem(dtype, outputs=9, features=7, index=INDEX, branches=6):
    index = torch.tensor(index, dtype=torch.int32)
    y = torch.randn(*index.shape, features).to(dtype)
    projection = (torch.randn(branches, outputs, features) / max(1, features) ** 0.5).to(dtype)
    bias, weight = torch.randn(outputs).to(dtype), torch.rand(index.shape).to(dtype)
    return y, projection, bias, index, weight


def expected(y, projection, bias, index, weight, grad_out):
    """The result and the gradients of y, routes.weight and projection, in float64."""
    leaves = [t.double().requires_grad_() for t in (y, weight, projection)]
    bias = None if bias is None else bias.double()
    out = reference(leaves[0], leaves[2], bias, index, leaves[1])
    return out, *torch.autograd.grad(out, leaves, grad_out.double())


def check(y, projection, bias, index, weight, grad_out=None, **options):
    out = launchers.forward(y, projection, bias, index, weight)
    assert out.dtype == y.dtype
    grad_out = torch.randn(out.shape).to(y.dtype) if grad_out is None else grad_out
    want = expected(y, projection, bias, index, weight, grad_out)
    got = (
        out,
        *launchers.grad_input(grad_out, y, projection, index, weight),
        launchers.grad_projection(grad_out, y, projection.shape, index, weight, **options),
    )
    names = ("out", "gradient of y", "gradient of routes.weight", "gradient of projection")
    for name, actual, right in zip(names, got, want, strict=True):
        assert_close(actual, right, name, scale=4.0)
    assert not got[3][want[3] == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype):
    check(*problem(dtype))


def test_weights_of_another_dtype():
    *tensors, weight = problem(torch.float16)
    check(*tensors, weight.float())


@pytest.mark.parametrize(
    ("outputs", "features", "index", "branches"),
    [(1, 1, ((0,),), 1), (70, 3, INDEX, 6), (3, 130, INDEX, 6), (5, 4, ((1, 0, 2),), 3)],
)
def test_sizes(outputs, features, index, branches):
    check(*problem(torch.float32, outputs, features, index, branches))


@pytest.mark.parametrize(("outputs", "features"), [(0, 7), (9, 0), (0, 0)])
def test_no_outputs_or_no_features(outputs, features):
    check(*problem(torch.float32, outputs, features))


def test_many_small_programs(monkeypatch):
    monkeypatch.setattr(launchers, "_OUTPUTS", 4)
    monkeypatch.setattr(launchers, "_FEATURES", 4)
    y, projection, bias, index, weight = problem(torch.float32)
    check(y, projection, bias, index, weight, tile=Tile(4, 4, 16, 1, 1))
    grad_out = torch.randn(3, 9)
    tensors = (grad_out, y, projection, index, weight)
    both = launchers.grad_input(*tensors)
    only_y, nothing = launchers.grad_input(*tensors, need_weight=False)
    assert nothing is None
    assert_close(only_y, both[0].double(), "gradient of y alone")
    nothing, only_weight = launchers.grad_input(*tensors, need_y=False)
    assert nothing is None
    assert torch.equal(only_weight, both[1])


def test_strides_and_no_bias():
    y, projection, _, index, weight = problem(torch.float32)
    y = y.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    projection = projection.transpose(1, 2).contiguous().transpose(1, 2)
    weight = weight.repeat_interleave(2, dim=1)[:, ::2]
    check(y, projection, None, index, weight, torch.randn(1).expand(3, 9))


def test_a_plan_that_was_made_before():
    y, projection, _, index, weight = problem(torch.float32)
    tensors = (torch.randn(3, 9), y, projection.shape, index, weight)
    plan = branch_plan(index, 6)
    assert torch.equal(
        launchers.grad_projection(*tensors, plan=plan), launchers.grad_projection(*tensors)
    )


def test_a_route_to_no_branch_adds_nothing():
    y, projection, bias, index, weight = problem(torch.float32)
    index[1, 0], index[2, 1] = -1, 6
    y[1, 0], weight[2, 1] = float("nan"), float("nan")
    stays = torch.ones(3, 2)
    stays[1, 0] = stays[2, 1] = 0
    grad_out = torch.randn(3, 9)
    got = (
        launchers.forward(y, projection, bias, index, weight),
        *launchers.grad_input(grad_out, y, projection, index, weight),
        launchers.grad_projection(grad_out, y, projection.shape, index, weight),
    )
    y, weight = y.nan_to_num(0.0), weight.nan_to_num(0.0) * stays
    out, grad_y, grad_weight, grad_projection = expected(
        y, projection, bias, index.clamp(0, 5), weight, grad_out
    )
    want = (out, grad_y * stays[..., None], grad_weight * stays, grad_projection)
    for actual, right in zip(got, want, strict=True):
        assert_close(actual, right, "with stray routes", scale=4.0)


def test_empty_batch():
    y, projection, bias, index, weight = problem(torch.float32)
    y, index, weight = y[:0], index[:0], weight[:0]
    out = launchers.forward(y, projection, bias, index, weight)
    assert out.shape == (0, 9)
    grad_y, grad_weight = launchers.grad_input(out, y, projection, index, weight)
    assert grad_y.shape == y.shape
    assert grad_weight.shape == weight.shape
    assert not launchers.grad_projection(out, y, projection.shape, index, weight).any()


def test_double_precision_is_refused():
    tensors = problem(torch.float64)
    with pytest.raises(TypeError, match=r"combine: the dtype must be float16, bfloat16 or float32"):
        launchers.forward(*tensors)
