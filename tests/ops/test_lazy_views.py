"""Views whose sign is only a flag (``torch._neg_view``): kernels must read what they mean."""

import pytest
import torch

from pyeff.ops import Routes, branch_conv2d, branch_linear, combine, nested_conv2d, top_k_routes

INDEX = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)


def nested(x, weight):
    return nested_conv2d(x, weight[0])


def branches(x, weight):
    return branch_conv2d(x, weight, None, INDEX)


def linear(x, weight):
    return branch_linear(x.flatten(1)[:, :72], weight.flatten(2), None, INDEX)


def combined(x, weight):
    pairs = x.flatten(1)[:, :144].unflatten(1, (2, 72))
    return combine(pairs, weight.flatten(2), None, Routes(INDEX, torch.ones(2, 2)))


@pytest.mark.parametrize("call", [nested, branches, linear, combined])
@pytest.mark.parametrize("negated", ["x", "weight", "gradient"])
def test_a_lazily_negated_view_is_read_with_its_sign(call, negated):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3, 4, 8, 3, 3).requires_grad_()
    result = call(x, weight)
    gradient = torch.randn_like(result)
    expected = torch.autograd.grad(result, [x, weight], gradient)
    lazy = torch._neg_view
    if negated == "gradient":
        found = torch.autograd.grad(result := call(x, weight), [x, weight], lazy(-gradient))
    elif negated == "x":
        found = torch.autograd.grad(result := call(lazy(-x), weight), [x, weight], gradient)
    else:
        found = torch.autograd.grad(result := call(x, lazy(-weight)), [x, weight], gradient)
    torch.testing.assert_close(result, call(x, weight))
    torch.testing.assert_close(found, expected)


def test_routes_of_lazily_negated_scores():
    scores = torch.randn(3, 5)
    found = top_k_routes(torch._neg_view(scores), 2)
    assert found.index.equal(top_k_routes(-scores, 2).index)
