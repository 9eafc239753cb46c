import pytest
import torch
from numerics import assert_close

import pyeff
from pyeff.ops import Routes, branch_linear
from pyeff.reference.branch_linear import branch_linear as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton", "cuda")
]
PROBLEMS = {  # images, routes, branches, features, outputs, one row for each pair
    "shared rows": (5, 3, 7, 9, 11, False),
    "a row for each pair": (5, 3, 7, 9, 11, True),
    "all ones": (1, 1, 1, 1, 1, False),
    "empty batch": (0, 3, 7, 9, 11, True),
    "one image": (1, 4, 20, 64, 100, True),
    "cifar head": (16, 4, 20, 64, 10, True),
    "wide": (3, 2, 4, 150, 70, False),
}


def problem(name, dtype, device="cpu"):
    n, k, branches, features, outputs, pairs = PROBLEMS[name]
    index = torch.randint(0, branches, (n, k), dtype=torch.int32)
    x = torch.randn((n, k, features) if pairs else (n, features))
    weight = torch.randn(branches, outputs, features) / features**0.5
    bias = torch.randn(branches, outputs)
    return [t.to(device, dtype) for t in (x, weight, bias)], index.to(device)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference(name, dtype, device, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take float16, bfloat16 and float32")
    tensors, index = problem(name, dtype, device)
    wide = [t.double().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    want = reference(*wide, index)
    grad = torch.randn_like(want).to(dtype)
    with pyeff.backend(backend):
        y = branch_linear(*tensors, index)
        assert y.dtype == dtype
        assert_close(y, want, "y")
        got = torch.autograd.grad(y, tensors, grad)
    uses = max(1, index.numel())
    never = torch.ones(tensors[1].shape[0], dtype=torch.bool)
    never[index.flatten().long().cpu()] = False
    grads = zip(got, torch.autograd.grad(want, wide, grad.double()), strict=True)
    for i, (g, w) in enumerate(grads):
        assert_close(g, w, f"gradient {i}", scale=4 * uses**0.5)
        if i:
            assert not g[never].any()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_row_is_linear_with_its_branch(backend):
    (x, weight, bias), index = problem("shared rows", torch.float64)
    with pyeff.backend(backend), torch.no_grad():
        for _ in range(3):  # the weight is read in place at first, packed later
            y = branch_linear(x, weight, bias, Routes(index, torch.ones(index.shape)))
    for n in range(5):
        for j in range(3):
            b = int(index[n, j])
            torch.testing.assert_close(
                y[n, j], torch.nn.functional.linear(x[n], weight[b], bias[b])
            )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_packed_weight_follows_every_change_of_the_weight(backend):
    (x, weight, bias), index = problem("cifar head", torch.float32)
    with torch.no_grad(), pyeff.backend(backend):
        for change in (lambda: None, lambda: weight.mul_(2), lambda: weight[3].zero_()):
            change()
            for _ in range(3):
                y = branch_linear(x, weight, bias, index)
            want = reference(x.double(), weight.double(), bias.double(), index)
            assert_close(y, want, "y", scale=2)


def test_packs_the_weight_that_was_given():
    from pyeff.ops._packed import _packed

    pyeff.clear_packed()
    (x, weight, bias), index = problem("cifar head", torch.float32)
    with torch.no_grad(), pyeff.backend("cpp"):
        for _ in range(3):
            branch_linear(x, weight, bias, index)
    assert len(_packed) == 1
    assert isinstance(_packed.get(weight).copy, torch.Tensor)


def test_accepts_any_strides():
    (x, weight, bias), index = problem("a row for each pair", torch.float32)
    want = reference(x.double(), weight.double(), bias.double(), index)
    views = (
        (x.transpose(0, 2).contiguous().transpose(0, 2), weight),
        (torch.cat([x, x], 2)[..., :9], weight.transpose(0, 2).contiguous().transpose(0, 2)),
    )
    for backend in ("reference", "torch", "cpp"):
        for x_view, weight_view in views:
            with pyeff.backend(backend):
                assert_close(branch_linear(x_view, weight_view, bias, index), want, backend)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", ["shared rows", "a row for each pair"])
def test_gradcheck(name, backend):
    tensors, index = problem(name, torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    with pyeff.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: branch_linear(*t, index), tensors)
        assert torch.autograd.gradgradcheck(lambda *t: branch_linear(*t, index), tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(4,)), r"x must be \[N, I\] or \[N, k, I\], got \[4\]"),
        (dict(weight=(3, 4)), r"weight must be \[B, O, I\], got \[3, 4\]"),
        (dict(bias=torch.randn(6)), r"bias must be \[3, 6\], got \[6\]"),
        (dict(x=(2, 5)), "x must have the 4 features of a branch, got 5"),
        (dict(x=(2, 3, 4)), r"x must have a row for each of 2 routes, got \[2, 3, 4\]"),
        (dict(x=(3, 4)), r"routes.index must have a row for each of 3 images, got \[2, 2\]"),
        (dict(weight=(0, 6, 4)), "weight must have at least one branch, got 0"),
        (dict(weight=(3, 0, 4)), r"weight must have features, got \[3, 0, 4\]"),
        (dict(x=(2, 0), weight=(3, 6, 0)), r"weight must have features, got \[3, 6, 0\]"),
        (dict(index=[[0, 3], [0, 1]]), "routes.index must name branches 0 to 2, got 3"),
        (dict(index=[[0, -1], [0, 1]]), "routes.index must name branches from 0 on, got -1"),
        (dict(x=torch.randn(2, 4).double()), "weight must have the dtype of x, .*float64, got"),
        (dict(weight=torch.randn(3, 6, 4, device="meta")), "weight must be on the device of x"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    for backend in ("reference", "torch", "cpp"):
        with (
            pyeff.backend(backend),
            pytest.raises(ValueError, match=f"branch_linear: {message}"),
        ):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=3), "x must be a tensor, got int"),
        (dict(x=torch.ones(2, 4, dtype=torch.int32)), "x must be a floating-point tensor, got"),
        (dict(bias=3), "bias must be a tensor or None, got int"),
        (dict(index=[[0.0, 1.0], [1.0, 2.0]]), "routes must be Routes or an int32 or int64 tensor"),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"branch_linear: {message}"):
        call(**arguments)


def call(x=(2, 4), weight=(3, 6, 4), bias=None, index=((0, 2), (1, 1))):
    x = torch.randn(x) if isinstance(x, tuple) else x
    weight = torch.randn(weight) if isinstance(weight, tuple) else weight
    return branch_linear(x, weight, bias, torch.tensor(index))
