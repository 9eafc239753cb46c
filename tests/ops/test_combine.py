import pytest
import torch
from numerics import DEVICES, assert_close
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.ops import Routes, combine
from pyeff.reference.combine import combine as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [("cpu", b) for b in ("reference", "torch", "cpp")] + [
    pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("torch", "triton", "cuda")
]
PROBLEMS = {  # images, routes, branches, features, outputs
    "no two dimensions equal": (5, 3, 7, 9, 11),
    "all ones": (1, 1, 1, 1, 1),
    "empty batch": (0, 3, 7, 9, 11),
    "one image": (1, 4, 20, 64, 100),
    "cifar": (16, 4, 20, 64, 100),
    "all branches": (3, 6, 6, 33, 70),
    "no features": (3, 2, 4, 0, 5),
    "no outputs": (3, 2, 4, 5, 0),
}
NAMES = ("y", "projection", "bias", "weight")


def problem(name, dtype, device="cpu"):
    """y, projection, bias, the routes' weight, and their index; a branch may repeat in a row."""
    n, k, branches, features, outputs = PROBLEMS[name]
    index = torch.randint(0, branches, (n, k), dtype=torch.int32)
    y = torch.randn(n, k, features)
    projection = torch.randn(branches, outputs, features) / max(1, k * features) ** 0.5
    tensors = (y, projection, torch.randn(outputs), torch.rand(n, k) + 0.5)
    return [t.to(device, dtype) for t in tensors], index.to(device)


def call(y, projection, bias, weight, index):
    return combine(y, projection, bias, Routes(index, weight))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference(name, dtype, device, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take float16, bfloat16 and float32")
    tensors, index = problem(name, dtype, device)
    wide = [t.double().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    want = reference(wide[0], wide[1], wide[2], index, wide[3])
    grad = torch.randn_like(want).to(dtype)
    with pyeff.backend(backend):
        z = call(*tensors, index)
        assert z.dtype == dtype
        assert_close(z, want, "z")
        with torch.no_grad():
            for _ in range(3):  # the projection is read in place at first, packed later
                assert_close(call(*tensors, index), want, "z without gradients")
        got = torch.autograd.grad(z, tensors, grad)
    n, _, _, _, outputs = PROBLEMS[name]
    sums = dict(y=1, projection=n, bias=n, weight=outputs)  # unit terms in a gradient's element
    never = torch.ones(tensors[1].shape[0], dtype=torch.bool)
    never[index.flatten().long().cpu()] = False
    wants = torch.autograd.grad(want, wide, grad.double())
    for which, g, w in zip(NAMES, got, wants, strict=True):
        scale = 4 * max(1, sums[which]) ** 0.5
        assert_close(g, w, f"gradient of {which}", scale=scale)
        if which == "projection":
            assert not g[never].any(), "gradient of projections that nobody took"


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_is_a_sum_of_linear_layers(backend):
    (y, projection, bias, weight), index = problem("no two dimensions equal", torch.float64)
    with pyeff.backend(backend):
        z = call(y, projection, bias, weight, index)
    for n in range(5):
        want = bias.clone()
        for j in range(3):
            want += weight[n, j] * (projection[int(index[n, j])] @ y[n, j])
        torch.testing.assert_close(z[n], want)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_each_gradient_alone(backend):
    tensors, index = problem("no two dimensions equal", torch.float64)
    with pyeff.backend(backend):
        for i, name in enumerate(NAMES):
            leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
            z = call(*leaves, index)
            (got,) = torch.autograd.grad(z.square().sum(), leaves[i])
            want = reference(leaves[0], leaves[1], leaves[2], index, leaves[3])
            (want,) = torch.autograd.grad(want.square().sum(), leaves[i])
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_without_bias_with_other_weight_dtype_and_any_strides(backend):
    (y, projection, _, weight), index = problem("cifar", torch.float32)
    want = reference(y.double(), projection.double(), None, index, weight.double())
    y = y.transpose(0, 2).contiguous().transpose(0, 2)
    projection = projection.transpose(0, 1).contiguous().transpose(0, 1)
    routes = Routes(index.long().t().contiguous().t(), weight.double())
    with pyeff.backend(backend), torch.no_grad():
        for _ in range(3):
            assert_close(combine(y, projection, None, routes), want, "z")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_packed_projection_follows_every_change(backend):
    tensors, index = problem("cifar", torch.float32)
    projection = tensors[1]
    with torch.no_grad(), pyeff.backend(backend):
        for change in (lambda: None, lambda: projection.mul_(2), lambda: projection[3].zero_()):
            change()
            for _ in range(3):
                z = call(*tensors, index)
            wide = [t.double() for t in tensors]
            want = reference(wide[0], wide[1], wide[2], index, wide[3])
            assert_close(z, want, "z", scale=2)


# --- gradients, registration, compilers -----------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_gradcheck(backend):
    tensors, index = problem("no two dimensions equal", torch.float64)
    tensors = [t[:3, :2] if t.dim() == 3 and t.shape[1] == 3 else t for t in tensors[:3]] + [
        tensors[3][:3, :2]
    ]
    tensors = [t.detach().requires_grad_() for t in tensors]
    with pyeff.backend(backend):
        f = lambda *t: call(*t, index[:3, :2])  # noqa: E731
        assert torch.autograd.gradcheck(f, tensors)
        assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_is_registered_correctly(device):
    (y, projection, bias, weight), index = problem("no two dimensions equal", torch.float32, device)
    op = torch.ops.pyeff.combine.default
    torch.library.opcheck(op, (y, projection, bias, index, weight))
    leaves = [t.clone().requires_grad_() for t in (y, projection, weight)]
    torch.library.opcheck(op, (*leaves[:2], None, index, leaves[2]))
    grad = torch.randn(5, 11, device=device)
    for need in ((True, False), (False, True), (True, True)):
        torch.library.opcheck(
            torch.ops.pyeff.combine_grad_input.default, (grad, y, projection, index, weight, *need)
        )
    torch.library.opcheck(
        torch.ops.pyeff.combine_grad_projection.default, (grad, y, index, weight, 7)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(*t).relu(), backend=backend, fullgraph=True)
    tensors, index = problem("no two dimensions equal", torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    got, want = compiled(*tensors, index), call(*tensors, index).relu()
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad)
    )
    with pytest.raises(ValueError, match=r"routes\.index must name"):
        compiled(*tensors, index + 7)


def test_autocast_lowers_the_precision_and_keeps_float32_gradients():
    tensors, index = problem("no two dimensions equal", torch.float32)
    rounded = [t.bfloat16().double() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        z = call(*tensors, index)
        mixed = call(tensors[0].bfloat16(), *tensors[1:], index)
    assert z.dtype == mixed.dtype == torch.bfloat16
    assert_close(z, reference(rounded[0], rounded[1], rounded[2], index, rounded[3]), "z")
    grads = torch.autograd.grad(z.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)


def test_flops_are_counted():
    (y, projection, bias, weight), index = problem("cifar", torch.float32)
    y.requires_grad_()
    projection.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        z = call(y, projection, bias, weight, index)
        forward = counter.get_total_flops()
        z.sum().backward()
    assert forward == 2 * y.numel() * projection.shape[1]
    assert counter.get_total_flops() == 3 * forward


def test_works_under_functional_transforms():
    (y, projection, bias, weight), index = problem("no two dimensions equal", torch.float64)

    def loss(p):
        return call(y, p, bias, weight, index).square().sum()

    leaf = projection.clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(projection), want)


def test_shapes_without_values():
    tensors, index = problem("cifar", torch.float32, "meta")
    z = call(*tensors, index)
    assert z.is_meta
    assert z.shape == (16, 100)


# --- refusals -------------------------------------------------------------------------------------


def refused(
    y=(2, 2, 4), projection=(3, 6, 4), bias=None, index=((0, 2), (1, 1)), weight=(2, 2), routes=None
):
    y, projection, weight = (
        torch.randn(t) if isinstance(t, tuple) else t for t in (y, projection, weight)
    )
    return combine(y, projection, bias, routes or Routes(torch.tensor(index), weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(y=(2, 4)), r"y must be \[N, k, F\], got \[2, 4\]"),
        (dict(projection=(3, 4)), r"projection must be \[B, O, F\], got \[3, 4\]"),
        (dict(projection=(0, 6, 4)), "projection must have at least one branch, got 0"),
        (dict(bias=torch.randn(3, 6)), r"bias must be \[6\], got \[3, 6\]"),
        (dict(y=(2, 2, 5)), r"y must be \[2, 2, 4\], the features of every pair, got \[2, 2, 5\]"),
        (dict(y=(2, 3, 4)), r"y must be \[2, 2, 4\], the features of every pair, got \[2, 3, 4\]"),
        (dict(y=(3, 2, 4)), "routes.index must have a row for each of 3 images"),
        (dict(index=((0,), (1,)), weight=(2, 2)), "routes.weight must have the shape of"),
        (dict(weight=(2,)), r"routes.weight must be \[N, k\], got \[2\]"),
        (dict(weight=torch.ones(2, 2, device="meta")), "routes.weight must be on the device of y"),
        (dict(projection=torch.randn(3, 6, 4).half()), "projection must have the dtype of y"),
        (dict(bias=torch.randn(6, device="meta")), "bias must be on the device of y"),
        (dict(index=((0, 3), (1, 1))), "routes.index must name branches 0 to 2, got 3"),
        (dict(index=((0, -2), (1, 1))), "routes.index must name branches from 0 on, got -2"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"combine: {message}"):
        refused(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(y=[1.0]), "y must be a tensor, got list"),
        (dict(projection=torch.ones(3, 6, 4).int()), "projection must be a floating-point tensor"),
        (dict(bias=1.0), "bias must be a tensor or None, got float"),
        (dict(routes=torch.ones(2, 2).int().unbind()), "routes must be Routes, got tuple"),
        (dict(weight=torch.ones(2, 2).int()), "routes.weight must be a floating-point tensor"),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"combine: {message}"):
        refused(**arguments)
