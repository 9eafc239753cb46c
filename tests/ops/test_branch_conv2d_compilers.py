"""branch_conv2d under differentiation twice over, compilers, exporters, autocast and modes."""

import pytest
import torch
from numerics import DEVICES, assert_close
from ops.branch_cases import CASES, Case
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.ops import Routes, branch_conv2d, top_k_routes
from pyeff.ops._conv_args import padding_sides, pair
from pyeff.reference.branch_conv2d import branch_conv2d as reference

SMALL = {
    "shared": Case(2, 2, 3, 3, 2, (5, 4), padding=1),
    "pairs": Case(1, 3, 3, 2, 3, (4, 5), stride=2, padding=1, shared=False),
    "repeated": Case(2, 2, 3, 2, 2, (3, 3), index=((1, 1), (0, 1)), bias=False),
    "groups": Case(1, 2, 2, 4, 6, (4, 4), groups=2, padding=1),
    "depth-wise, pairs": Case(1, 2, 3, 3, 3, (4, 4), groups=3, padding=1, shared=False),
    "same, even": Case(1, 2, 2, 3, 2, (4, 4), (2, 2), padding="same"),
}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(case, backend):
    tensors = [t if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    index = case.routes()

    def call(*given):
        return branch_conv2d(*given, *[None] * (3 - len(given)), index, **case.options())

    with pyeff.backend(backend):
        assert torch.autograd.gradcheck(call, [t for t in tensors if t is not None])
        assert torch.autograd.gradgradcheck(call, [t for t in tensors if t is not None])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_each_gradient_alone(wanted, backend):
    case = CASES["cifar branch"]
    tensors = dict(zip(("x", "weight", "bias"), case.tensors(torch.float64), strict=True))
    index = case.routes()
    tensors[wanted].requires_grad_()
    with pyeff.backend(backend):
        y = branch_conv2d(*tensors.values(), index, **case.options())
        (got,) = torch.autograd.grad(y.square().sum(), tensors[wanted])
    want = reference(*tensors.values(), index, **case.options())
    (want,) = torch.autograd.grad(want.square().sum(), tensors[wanted])
    torch.testing.assert_close(got, want)


def lowered(case, device="cpu", dtype=torch.float32):
    """What the registered operator takes: x, weight, bias, index, and where the kernel lies."""
    stride, dilation = pair("t", "s", case.stride, 1), pair("t", "d", case.dilation, 1)
    sides = padding_sides("t", case.padding, case.kernel, stride, dilation)
    conv = (list(stride), list(sides), list(dilation), case.groups)
    return (*case.tensors(dtype, device), case.routes(device), conv)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_is_registered_correctly(case, device):
    x, weight, bias, index, conv = lowered(case, device)
    op = torch.ops.pyeff.branch_conv2d.default
    torch.library.opcheck(op, (x, weight, bias, index, *conv))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(op, (*leaves, None, index, *conv))
    grad_y = torch.randn_like(op(x, weight, None, index, *conv))
    torch.library.opcheck(
        torch.ops.pyeff.branch_conv2d_grad_input.default,
        (grad_y, weight, index, list(x.shape), *conv),
    )
    for with_bias in (False, True):
        torch.library.opcheck(
            torch.ops.pyeff.branch_conv2d_grad_weight.default,
            (grad_y, x, index, list(weight.shape), with_bias, *conv),
        )


class TwoLayers(torch.nn.Module):
    """A branch of two layers on the images' own routes."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(5, 6, 4, 3, 3) / 6)
        self.bias = torch.nn.Parameter(torch.randn(5, 6))
        self.second = torch.nn.Parameter(torch.randn(5, 6, 1, 3, 3) / 3)

    def forward(self, x, scores):
        routes = top_k_routes(scores, 2)
        y = branch_conv2d(x, self.first, self.bias, routes, padding=1, stride=2).relu()
        return branch_conv2d(y, self.second, None, routes, padding=1, groups=6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_batch(backend):
    torch._dynamo.reset()
    module = TwoLayers()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 5):
        x, scores = torch.randn(n, 4, 6, 7, requires_grad=True), torch.randn(n, 5)
        got, want = compiled(x, scores), module(x, scores)
        torch.testing.assert_close(got, want)
        leaves, grad_y = (x, *module.parameters()), torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, grad_y), torch.autograd.grad(want, leaves, grad_y)
        )


def test_a_compiled_graph_checks_the_index_it_is_given():
    torch._dynamo.reset()
    compiled = torch.compile(branch_conv2d, backend="aot_eager", fullgraph=True)
    x, weight, bias = CASES["cifar branch"].tensors(torch.float32)
    index = torch.zeros(5, 4, dtype=torch.int32)
    compiled(x, weight, bias, index)
    for wrong in (20, -1):
        index = index.clone()
        index[2, 3] = wrong
        with pytest.raises(ValueError, match=r"routes\.index must name branches"):
            compiled(x, weight, bias, index)


def test_exports_with_any_batch():
    module = TwoLayers().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(4, 4, 6, 7), torch.randn(4, 5))
    program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}))
    for n in (1, 9):
        given = torch.randn(n, 4, 6, 7), torch.randn(n, 5)
        torch.testing.assert_close(program.module()(*given), module(*given))


def test_autocast_lowers_the_precision_and_keeps_float32_gradients():
    case = CASES["cifar branch"]
    x, weight, bias = (t.requires_grad_() for t in case.tensors(torch.float32))
    index = case.routes()
    with torch.autocast("cpu", torch.bfloat16):
        y = branch_conv2d(x, weight, bias, index, **case.options())
        mixed = branch_conv2d(x.bfloat16(), weight, bias, index, **case.options())
    assert y.dtype == mixed.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().double() for t in (x, weight, bias)]
    assert_close(y, reference(*rounded, index, **case.options()), "y")
    grads = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("name", ["groups", "groups, pairs"])
def test_flops_are_counted(name):
    case = CASES[name]
    x, weight, bias = (t.requires_grad_() for t in case.tensors(torch.float32))
    index = case.routes()
    with FlopCounterMode(display=False) as counter:
        y = branch_conv2d(x, weight, bias, index, **case.options())
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * y.numel() * weight[0, 0].numel()
    assert counter.get_total_flops() == 3 * forward


def test_works_under_functional_transforms():
    case = SMALL["shared"]
    x, weight, bias = case.tensors(torch.float64)
    index = case.routes()

    def loss(w, index=index):
        return branch_conv2d(x, w, bias, index, **case.options()).square().sum()

    leaf = weight.clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)
    tangent = torch.randn_like(weight)
    _, slope = torch.func.jvp(loss, (weight,), (tangent,))
    torch.testing.assert_close(slope, (want * tangent).sum())
    indices = torch.stack([index, index.flip(1), index.flip(0)])
    mapped = torch.func.vmap(loss, in_dims=(None, 0))(weight, indices)
    torch.testing.assert_close(mapped, torch.stack([loss(weight, i) for i in indices]))
    with pytest.raises(ValueError, match=r"branch_conv2d: routes\.index must name"):
        torch.func.grad(loss)(weight, index + 5)


@pytest.mark.parametrize("name", ["cifar branch", "cifar branch, pairs", "depth-wise"])
def test_shapes_without_values(name):
    case = CASES[name]
    y = branch_conv2d(*case.tensors(torch.float32, "meta"), case.routes("meta"), **case.options())
    real = branch_conv2d(*case.tensors(torch.float32), case.routes(), **case.options())
    assert y.is_meta
    assert y.shape == real.shape
    assert y.stride() == real.stride()


def test_inference_mode():
    case = CASES["cifar branch"]
    with torch.inference_mode():
        x, weight, bias = case.tensors(torch.float32)
        index = case.routes()
        routes = Routes(index, torch.ones(index.shape))
        for backend in ("reference", "torch", "cpp"):
            with pyeff.backend(backend):
                for _ in range(3):
                    y = branch_conv2d(x, weight, bias, routes, **case.options())
            want = reference(x.double(), weight.double(), bias.double(), index, **case.options())
            assert_close(y, want, backend)
            with pyeff.backend(backend), pytest.raises(ValueError, match="must name branches"):
                branch_conv2d(x, weight, bias, index + 20, **case.options())


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    case = CASES["cifar branch"]
    x, weight, bias = case.tensors(torch.float32, "cuda")
    scores = torch.randn(5, 20, device="cuda")

    def run():
        return branch_conv2d(x, weight, bias, top_k_routes(scores, 4), padding=1)

    with torch.no_grad(), pyeff.backend("triton"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        scores.copy_(torch.randn_like(scores))
        graph.replay()
        torch.testing.assert_close(y, run())
