"""What branch_conv2d refuses, and with which words."""

import contextlib

import pytest
import torch

import pyeff
from pyeff import _C
from pyeff.ops import Routes, branch_conv2d

INDEX = torch.tensor([[0, 2], [1, 1]])


def call(x=(2, 4, 5, 5), weight=(3, 6, 4, 3, 3), bias=None, routes=INDEX, **options):
    x = torch.randn(x) if isinstance(x, tuple) else x
    weight = torch.randn(weight) if isinstance(weight, tuple) else weight
    return branch_conv2d(x, weight, bias, routes, **options)


def test_the_call_itself_is_accepted():
    assert call().shape == (2, 2, 6, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(4, 5, 5)), r"x must be \[N, C, H, W\] or \[N, k, C, H, W\], got \[4, 5, 5\]"),
        (dict(weight=(6, 4, 3, 3)), r"weight must be \[B, O, C / groups, kh, kw\], got \[6, 4"),
        (dict(weight=(0, 6, 4, 3, 3)), "weight must have at least one branch, got 0"),
        (
            dict(weight=(3, 6, 4, 0, 3)),
            r"weight must have a kernel of 1x1 or more, got \[3, 6, 4, 0",
        ),
        (dict(weight=(3, 0, 4, 3, 3)), r"weight must have channels, got \[3, 0, 4, 3, 3\]"),
        (dict(x=(2, 0, 5, 5), weight=(3, 6, 0, 3, 3)), "weight must have channels, got"),
        (dict(weight=(3, 0, 4, 3, 3), groups=7), "weight must have channels, got"),
        (
            dict(x=(2, 4, 0, 5), weight=(3, 6, 4, 1, 1), padding=1),
            r"x must have maps of at least one pixel, got \[2, 4, 0, 5\]",
        ),
        (dict(x=(2, 2, 4, 5, 0), padding=3), "x must have maps of at least one pixel, got"),
        (dict(x=(0, 4, 0, 0), routes=INDEX[:0], padding=3), "x must have maps of at least one"),
        (dict(bias=torch.randn(6)), r"bias must be \[3, 6\], got \[6\]"),
        (dict(bias=torch.randn(3, 6).double()), "bias must have the dtype of x, .*float32, got"),
        (dict(x=torch.randn(2, 4, 5, 5).double()), "weight must have the dtype of x, .*float64"),
        (
            dict(weight=torch.randn(3, 6, 4, 3, 3, device="meta")),
            "weight must be on the device of x, cpu, got meta",
        ),
        (dict(bias=torch.randn(3, 6, device="meta")), "bias must be on the device of x, cpu, got"),
        (dict(routes=INDEX.to("meta")), "routes.index must be on the device of x, cpu, got meta"),
        (dict(routes=INDEX[0]), r"routes.index must be \[N, k\], k at least 1, got \[2\]"),
        (dict(routes=INDEX[:, :0]), r"routes.index must be \[N, k\], k at least 1, got \[2, 0\]"),
        (dict(routes=INDEX[:1]), r"routes.index must have a row for each of 2 images, got \[1, 2"),
        (dict(routes=INDEX + 1), "routes.index must name branches 0 to 2, got 3"),
        (dict(routes=Routes(INDEX.int() * 9, torch.ones(2, 2))), "name branches 0 to 2, got 18"),
        (dict(routes=INDEX - 1), "routes.index must name branches from 0 on, got -1"),
        (dict(x=(2, 3, 5, 5)), "x must have the 4 input channels of a branch, got 3"),
        (dict(groups=2), "x must have the 8 input channels of a branch, got 4"),
        (dict(x=(2, 3, 4, 5, 5)), r"x must have a map for each of 2 routes, got \[2, 3, 4, 5, 5\]"),
        (dict(groups=4), "groups must be at least 1 and divide the weight's 6 output channels"),
        (dict(groups=0), "groups must be at least 1"),
        (dict(stride=0), "stride must be at least 1, got 0"),
        (dict(stride=(1, 2, 3)), r"stride must be an int or two ints, got \(1, 2, 3\)"),
        (dict(padding=-1), "padding must be at least 0, got -1"),
        (dict(padding="full"), 'padding must be ints, "same" or "valid"'),
        (dict(padding="same", stride=2), 'padding "same" must come with stride 1'),
        (dict(dilation=3), "x must be at least as large as the kernel"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    for backend in (None, "reference", "torch", "cpp"):
        chosen = pyeff.backend(backend) if backend else contextlib.nullcontext()
        with chosen, pytest.raises(ValueError, match=f"branch_conv2d: .*{message}"):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1, 2]), "x must be a tensor, got list"),
        (dict(weight=3), "weight must be a tensor, got int"),
        (dict(bias=3), "bias must be a tensor or None, got int"),
        (dict(x=torch.zeros(2, 4, 5, 5, dtype=torch.int32)), "x must be a floating-point tensor"),
        (dict(routes=[[0, 1]]), "routes must be Routes or an int32 or int64 tensor, got list"),
        (
            dict(routes=INDEX.float()),
            "routes must be Routes or an int32 or int64 tensor, got torch",
        ),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"branch_conv2d: .*{message}"):
        call(**arguments)


@pytest.mark.parametrize("size", [2**28, 2**30 - 1])
def test_refuses_windows_whose_size_overflows(size):
    """One position that reads only padding, far apart: the copy of the map has no size."""
    options = dict(stride=2 * size, padding=size, dilation=size)
    message = "branch_conv2d: stride, padding and dilation must give maps that fit into memory"
    with pyeff.backend("cpp"), pytest.raises(ValueError, match=message):
        call(**options)


@pytest.mark.parametrize("at", [0, 4])
def test_the_native_gradients_refuse_windows_whose_size_overflows(at):
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 6, 4, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    grad_y = torch.randn(2, 2, 3, 3, 6).movedim(-1, 2)
    problem = [1, 1, 0, 0, 1, 1, 1, 1, 0]
    problem[at] = problem[at + 1] = 2**31 - 1
    index, message = INDEX.int(), "must give maps that fit into memory"
    with pytest.raises(ValueError, match=f"branch_conv2d_grad_weight: .*{message}"):
        _C.branch_conv2d_grad_weight(grad_y, x, index, weight, None, tuple(problem))
    if at == 4:  # a stride makes the copy of the other gradient smaller
        with pytest.raises(ValueError, match=f"branch_conv2d_grad_input: .*{message}"):
            _C.branch_conv2d_grad_input(grad_y, weight, index, x, tuple(problem))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("grad", [False, True])
def test_every_backend_refuses_a_wrong_route(grad, backend):
    weight = torch.randn(3, 6, 4, 3, 3, requires_grad=grad)
    for wrong in (3, -1):
        index = INDEX.clone()
        index[1, 0] = wrong
        with pyeff.backend(backend), pytest.raises(ValueError, match="must name branches"):
            call(weight=weight, routes=index)


def test_a_changed_index_is_checked_again():
    for dtype in (torch.int32, torch.int64):
        index = INDEX.to(dtype, copy=True)
        call(routes=index)
        index[0, 0] = 9
        with pytest.raises(ValueError, match="name branches 0 to 2, got 9"):
            call(routes=index)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_an_index_may_share_its_memory(dtype):
    """Writing through NumPy changes the routes, but not the version of the tensor."""
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 6, 4, 3, 3)
    shared = INDEX.numpy().astype(dtype)
    index = torch.from_numpy(shared)
    branch_conv2d(x, weight, None, index)
    shared[:] = 1
    want = branch_conv2d(x, weight, None, torch.ones_like(INDEX))
    assert torch.equal(branch_conv2d(x, weight, None, index), want)
    shared[:] = 9
    with pytest.raises(ValueError, match="name branches from 0 to 2, got 9"):
        branch_conv2d(x, weight, None, index)


def test_a_checked_index_is_too_large_for_fewer_branches():
    index = INDEX.int()
    call(routes=index)
    with pytest.raises(ValueError, match="name branches 0 to 1, got 2"):
        call(weight=(2, 6, 4, 3, 3), routes=index)


@pytest.mark.gpu
def test_checks_values_on_a_gpu_where_asked():
    x, weight = torch.randn(2, 4, 5, 5, device="cuda"), torch.randn(3, 6, 4, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="name branches 0 to 2, got 3"):
        call(x, weight, routes=(INDEX + 1).cuda(), validate=True)


def test_backends_are_asked_for_by_name():
    with pyeff.backend("triton"), pytest.raises((ValueError, RuntimeError), match="triton"):
        call()
    with pyeff.backend("cuda"), pytest.raises(ValueError, match="cuda must get CUDA tensors"):
        call()
