"""factorized_conv2d under differentiation twice over, compilers, exporters, autocast and modes."""

import pytest
import torch
from numerics import DEVICES, assert_close
from ops.factorized_cases import ALL, CASES, NAMES, Case
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.ops import factorized_conv2d
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

SMALL = {
    "everything": Case(1, 3, 2, 4, (4, 5), inner="silu", outer="silu", given=ALL),
    "relus": Case(2, 2, 3, 2, (3, 4), outer="relu", given=ALL, vertical_first=False),
    "strided": Case(1, 2, 3, 2, (5, 4), stride=2, inner="relu6", outer="relu6", given=("scale",)),
    "dilated": Case(1, 2, 2, 3, (5, 6), dilation=2, inner="hardswish", outer="hardswish"),
    "linear": Case(1, 2, 3, 2, (5, 4), 5, padding=1, inner=None, given=("shift", "residual")),
}


def options_of(case):
    """What the registered operator takes after its tensors."""
    padding = {"same": case.dilation * (case.taps // 2), "valid": 0}.get(case.padding, case.padding)
    return case.stride, padding, case.dilation, case.inner, case.outer


def on_given(case, function=factorized_conv2d):
    """The call as a function of the tensors that are given, and these."""
    tensors = case.tensors(torch.float64)
    names = [name for name in NAMES if tensors[name] is not None]

    def run(*given):
        t = {**tensors, **dict(zip(names, given, strict=True))}
        first = [t.pop(name) for name in NAMES[:5]]
        return function(*first, **t, **case.options())

    return run, [tensors[name].requires_grad_() for name in names]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(case, backend):
    run, given = on_given(case)
    with pyeff.backend(backend):
        assert torch.autograd.gradcheck(run, given)
        assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("wanted", range(len(NAMES)), ids=NAMES)
def test_each_gradient_alone(wanted, backend):
    for case in (SMALL["everything"], SMALL["relus"]):
        run, given = on_given(case)
        expected = on_given(case, reference)[0]
        given = [t.detach() for t in given]
        given[wanted].requires_grad_()
        with pyeff.backend(backend):
            (got,) = torch.autograd.grad(run(*given).square().sum(), given[wanted])
        torch.manual_seed(0)
        (want,) = torch.autograd.grad(expected(*given).square().sum(), given[wanted])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_is_registered_correctly(case, device):
    tensors = list(case.tensors(torch.float32, device).values())
    op = torch.ops.pyeff.factorized_conv2d.default
    torch.library.opcheck(op, (*tensors, *options_of(case)))
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(op, (*leaves, *options_of(case)))
    grad = torch.randn_like(op(*tensors, *options_of(case)))
    for wanted in (
        [True] * 5,
        [False, True, False, False, True],
        [False, False, False, True, False],
    ):
        torch.library.opcheck(
            torch.ops.pyeff.factorized_conv2d_backward.default,
            (grad, *tensors[:4], *options_of(case)[:4], wanted),
        )


class TwoPairs(torch.nn.Module):
    """ERFNet's block on 6 channels, its norms folded."""

    def __init__(self):
        super().__init__()
        vertical, horizontal = torch.randn(2, 6, 6, 3, 1) / 4, torch.randn(2, 6, 6, 1, 3) / 4
        self.vertical, self.horizontal = map(torch.nn.Parameter, (vertical, horizontal))
        self.vectors = torch.nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        b, c, scale, shift = self.vectors
        y = factorized_conv2d(x, self.vertical[0], b, self.horizontal[0], c, outer="relu")
        second = (self.vertical[1], b, self.horizontal[1], c)
        options = dict(dilation=2, scale=scale, shift=shift, residual=x, outer="relu")
        return factorized_conv2d(y, *second, **options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_size(backend):
    torch._dynamo.reset()
    module = TwoPairs()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for n, height, width in ((3, 6, 7), (5, 9, 12)):
        x = torch.randn(n, 6, height, width, requires_grad=True)
        got, want = compiled(x), module(x)
        torch.testing.assert_close(got, want)
        leaves, grad_y = (x, *module.parameters()), torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, grad_y), torch.autograd.grad(want, leaves, grad_y)
        )


def test_exports_with_any_size():
    module = TwoPairs().eval()
    sizes = {i: torch.export.Dim(name, min=1, max=64) for i, name in ((0, "n"), (2, "h"), (3, "w"))}
    program = torch.export.export(module, (torch.randn(4, 6, 6, 7),), dynamic_shapes=(sizes,))
    for shape in ((1, 6, 9, 5), (9, 6, 16, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_lowers_the_precision_and_keeps_float32_gradients():
    case = CASES["everything"]
    tensors = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    x, w_first, b_first, w_second, b_second, scale, shift, residual = leaves
    rest = dict(scale=scale, shift=shift, **case.options())
    with torch.autocast("cpu", torch.bfloat16):
        y = factorized_conv2d(x, w_first, b_first, w_second, b_second, residual=residual, **rest)
        mixed = factorized_conv2d(
            x.bfloat16(), w_first, b_first, w_second, b_second, residual=residual, **rest
        )
    assert y.dtype == mixed.dtype == torch.bfloat16
    x, w_first, b_first, w_second, b_second, scale, shift, residual = (
        t.detach().bfloat16().double() for t in leaves
    )
    rest = dict(scale=scale, shift=shift, residual=residual, **case.options())
    assert_close(y, reference(x, w_first, b_first, w_second, b_second, **rest), "y", scale=4.0)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("name", ["everything", "stride 2", "stride 2, horizontal first"])
def test_flops_are_counted(name):
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    for t in tensors.values():
        if t is not None:
            t.requires_grad_()
    first = [tensors.pop(name) for name in NAMES[:5]]

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            y = function(*first, **tensors, **case.options())
            forward = counter.get_total_flops()
            y.sum().backward()
        return forward, counter.get_total_flops() - forward

    (forward, backward), (plain, plain_backward) = counted(factorized_conv2d), counted(reference)
    assert forward == plain
    line = 2 * case.n * case.middle * case.channels * case.taps
    height, width = case.output_size()
    again = line * (height * case.size[1] if case.vertical_first else case.size[0] * width)
    assert backward == plain_backward + again  # the middle map once more


def test_works_under_functional_transforms():
    run, given = on_given(SMALL["everything"])
    given = [t.detach() for t in given]

    def loss(weight, *rest):
        return run(given[0], weight, *given[2:]).square().sum()

    leaf = given[1].clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(given[1]), want)
    tangent = torch.randn_like(given[1])
    _, slope = torch.func.jvp(loss, (given[1],), (tangent,))
    torch.testing.assert_close(slope, (want * tangent).sum())
    weights = torch.stack([given[1], 2 * given[1]])
    torch.testing.assert_close(torch.func.vmap(loss)(weights), torch.stack([*map(loss, weights)]))


@pytest.mark.parametrize("name", ["everything", "stride 2, horizontal first", "valid"])
def test_shapes_without_values(name):
    case = CASES[name]

    def on(device):
        t = case.tensors(torch.float32, device)
        first = [t.pop(name) for name in NAMES[:5]]
        return factorized_conv2d(*first, **t, **case.options())

    y, real = on("meta"), on("cpu")
    assert y.is_meta
    assert y.shape == real.shape
    assert y.stride() == real.stride()


def test_inference_mode():
    case = CASES["everything"]
    with torch.inference_mode():
        tensors = case.tensors(torch.float32)
        first = [tensors.pop(name) for name in NAMES[:5]]
        wide = [t.double() for t in first]
        rest = {name: t.double() for name, t in tensors.items()}
        want = reference(*wide, **rest, **case.options())
        for backend in ("reference", "torch", "cpp"):
            with pyeff.backend(backend):
                for _ in range(3):
                    y = factorized_conv2d(*first, **tensors, **case.options())
            assert_close(y, want, backend, scale=4.0)


@pytest.mark.parametrize("negated", NAMES)
def test_lazily_negated_views_are_read_with_their_sign(negated):
    case = CASES["everything"]
    tensors = case.tensors(torch.float32)
    want = {**tensors, negated: -tensors[negated]}
    lazy = {**tensors, negated: torch._neg_view(tensors[negated])}
    results = []
    for t in (want, lazy):
        first = [t.pop(name) for name in NAMES[:5]]
        results.append(factorized_conv2d(*first, **t, **case.options()))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    case = CASES["erfnet, 64 channels"]
    tensors = case.tensors(torch.float16, "cuda")
    first = [tensors.pop(name) for name in NAMES[:5]]

    def run():
        return factorized_conv2d(*first, **tensors, **case.options())

    with torch.no_grad(), pyeff.backend("triton"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        first[0].copy_(torch.randn_like(first[0]))
        graph.replay()
        torch.testing.assert_close(y, run())
