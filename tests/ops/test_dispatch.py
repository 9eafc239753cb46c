"""Which backend a call runs on."""

import threading

import pytest
import torch

import pyeff
from pyeff.ops import _dispatch
from pyeff.ops._branch_conv2d_backends import bias_gradient
from pyeff.ops._nested_conv2d_backends import Conv
from pyeff.ops._nested_conv2d_op import _grad_bias


@pytest.fixture
def chosen(monkeypatch):
    """Names of backends, as calls choose them."""
    names = []
    check = _dispatch._check_usable

    def recorded(op, name, x):
        names.append(name)
        return check(op, name, x)

    monkeypatch.setattr(_dispatch, "_check_usable", recorded)
    return names


def test_gradients_run_on_the_forced_backend_in_other_threads_too(chosen):
    # Autograd runs the backward of GPU operations in a thread of the device.
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with pyeff.backend("torch"):
        loss = pyeff.ops.nested_conv2d(x, weight).sum()
        forward = len(chosen)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert chosen == ["torch"] * len(chosen)
    assert len(chosen) >= forward + 2  # both gradients chose


def test_blocks_nest_and_end_in_any_order():
    outer, inner = pyeff.backend("cpp"), pyeff.backend("torch")
    again = pyeff.backend("cpp")
    for block in (outer, inner, again):
        block.__enter__()
    again.__exit__(None, None, None)
    assert _dispatch.forced_backend() == "torch"
    outer.__exit__(None, None, None)
    assert _dispatch.forced_backend() == "torch"
    inner.__exit__(None, None, None)
    assert _dispatch.forced_backend() is None


def test_gradients_of_biases_leave_out_routes_and_indices_that_name_nothing():
    """As on a GPU, where their values are not checked."""
    grad_y = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    index = torch.tensor([[0, -1, 2], [1, 3, 0]], dtype=torch.int32)
    got = bias_gradient(grad_y, index, 3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for n, j, branch in ((0, 0, 0), (0, 2, 2), (1, 0, 1), (1, 2, 0)):
        expected[branch] += grad_y[n, j].sum((1, 2))
    torch.testing.assert_close(got, expected)

    grad_y = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    conv = Conv((0, 2), torch.tensor([1, -1, 7]), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[1] = grad_y[:, 0].sum()
    torch.testing.assert_close(_grad_bias(grad_y, 4, conv), expected)
