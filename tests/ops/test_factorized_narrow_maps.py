"""Maps with fewer columns than the stride, on which bfloat16's weight gradient went wrong."""

import pytest
import torch

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference


@pytest.mark.parametrize("backend", [None, "torch", "cpp"])
@pytest.mark.parametrize("vertical_first", [True, False])
@pytest.mark.parametrize(("columns", "stride"), [(1, 2), (1, 3), (2, 3), (3, 4)])
def test_gradients_in_bfloat16(backend, vertical_first, columns, stride):
    lines = ((16, 16, 3, 1), (16, 16, 1, 3))
    shapes = [(8, 16, 5, columns), *(lines if vertical_first else reversed(lines))]
    made = [(torch.randn(shape) / 4).bfloat16() for shape in shapes]
    tensors = [t.requires_grad_() for t in made]
    wide = [t.detach().double().requires_grad_() for t in made]
    x, first, second = wide
    expected = reference(x, first, None, second, None, stride=stride, padding=1)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    # Unwritten memory is NaN here; several times, as it may hold what is right.
    for _ in range(3):
        x, first, second = tensors
        with pyeff.backend(backend) if backend else torch.enable_grad():
            y = factorized_conv2d(x, first, None, second, None, stride=stride, padding=1)
            gradients = torch.autograd.grad(y, tensors, weight.bfloat16())
        for gradient, other in zip(gradients, wide, strict=True):
            torch.testing.assert_close(gradient.double(), other.grad, rtol=0.05, atol=0.1)
