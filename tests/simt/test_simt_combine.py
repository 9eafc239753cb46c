"""combine and its gradients: the CUDA kernels on the host."""

import pytest
import torch
from numerics import assert_close
from ops import test_combine as cases

import pyeff
from pyeff.ops import _branch_combine_op as op
from pyeff.reference.combine import combine as reference

OPERATORS = ("combine", "top_k_routes")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.PROBLEMS)
def test_matches_reference(simt, name, dtype):
    cases.test_matches_reference(name, dtype, "cpu", "cuda")


@pytest.mark.parametrize("reverse", [False, True])
def test_each_gradient_alone_in_any_order_of_threads(simt, reverse):
    simt.set_reverse(reverse)
    cases.test_each_gradient_alone("cuda")


def test_without_bias_with_other_weight_dtype_and_any_strides(simt):
    cases.test_without_bias_with_other_weight_dtype_and_any_strides("cuda")


def test_gradcheck(simt):
    cases.test_gradcheck("cuda")


def test_a_route_to_no_branch_adds_nothing(simt, monkeypatch):
    (y, projection, bias, weight), index = cases.problem("no two dimensions equal", torch.float32)
    y[0] = torch.nan  # is not read
    index[0], index[1, 0] = torch.tensor([-1, 7, 2**31 - 1]), 7
    monkeypatch.setattr(op, "kernel_index", lambda _, index, *__: index)  # as on a GPU
    exists = ((index >= 0) & (index < 7)).double()
    leaves = [t.requires_grad_() for t in (y, projection, weight)]
    with pyeff.backend("cuda"):
        out = cases.call(*leaves[:2], bias, weight, index)
        grads = torch.autograd.grad(out.sum(), leaves)
    wide = [t.detach().double().nan_to_num().requires_grad_() for t in leaves]
    safe = index.clamp(0, 6)
    want = reference(wide[0], wide[1], bias.double(), safe, wide[2] * exists)
    assert_close(out, want, "out")
    wants = torch.autograd.grad(want.sum(), wide)
    for name, g, w in zip(("y", "projection", "weight"), grads, wants, strict=True):
        assert_close(g, w, name, scale=10.0)


def test_launches_are_on_the_callers_stream(simt):
    tensors, index = cases.problem("no two dimensions equal", torch.float32)
    with pyeff.backend("cuda"):
        out = cases.call(*(t.requires_grad_() for t in tensors), index)
        out.sum().backward()
    names = [r["name"] for r in simt.launches()]
    assert names == ["combine", "combine_grad_input", "branch_plan", "combine_grad_projection"]
    assert {r["stream"] for r in simt.launches()} == {0x517}
