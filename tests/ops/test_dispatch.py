"""Which backend a call runs on."""

import threading

import pytest
import torch

import pyeff
from pyeff.ops import _dispatch


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
