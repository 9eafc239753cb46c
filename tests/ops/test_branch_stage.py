import copy
import gc

import pytest
import torch
from numerics import assert_close, in_layout
from ops.stage_cases import CASES, Maker, StageCase, random_case, residual_stage
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.ops import BranchPlan, Routes, branch_stage
from pyeff.ops._branch_native import _entries
from pyeff.reference.branch_stage import branch_stage as reference

ISAS = pyeff.info()["isas"]
BACKENDS = ["reference", "torch", "cpp"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CIFAR = CASES["CIFAR stage, strided, projection"]


def expected(x, index, plan):
    """The reference in float64, on the steps as they were written."""
    steps = [
        s._replace(tensors=[None if t is None else t.double() for t in s.tensors])
        for s in plan.steps
    ]
    return reference(x.double(), index, steps, plan.output, vector=plan.vector)


def check(case, dtype, backend, what="", parameters=None):
    x, index, plan = case.make(dtype, parameters)
    want = expected(x, index, plan)
    with pyeff.backend(backend), torch.no_grad():
        y = branch_stage(x, index, plan)
    assert y.dtype == dtype
    assert y.shape == want.shape
    if y.dim() == 5:
        y = y.permute(0, 1, 3, 4, 2)
        want = want.permute(0, 1, 3, 4, 2)
    assert y.is_contiguous()
    # A branch is a chain of sums, each of about unit size.
    assert_close(y, want, what, scale=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matches_reference(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_reference(isa, dtype):
    with pyeff.isa(isa):
        for name, case in CASES.items():
            check(case, dtype, "cpp", f"{name}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_with_float32_parameters(dtype, backend):
    check(CIFAR, dtype, backend, parameters=torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", range(3))
def test_random_branches(isa, block):
    with pyeff.isa(isa):
        for seed in range(block * 50, block * 50 + 50):
            check(random_case(seed), torch.float32, "cpp", f"seed {seed}")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "channels_last", "slice of channels_last", "slice of rows", "transposed"],
)
def test_accepts_any_layout(layout, backend):
    for case in (CIFAR, CASES["one step, wide"], CASES["bottleneck stage, uneven channels"]):
        x, index, plan = case.make(torch.float32)
        with pyeff.backend(backend):
            y = branch_stage(in_layout(x, layout), index, plan)
        assert_close(y, expected(x, index, plan), layout, scale=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["CIFAR stage, strided, projection", "vectors"])
def test_one_input_for_every_pair(name, backend):
    x, index, plan = CASES[name].make(torch.float32)
    pairs = torch.randn(*index.shape, *x.shape[1:])
    with pyeff.backend(backend):
        y = branch_stage(pairs, index, plan)
    assert_close(y, expected(pairs, index, plan), "y", scale=4.0)


def test_a_branch_may_stand_twice_in_a_row():
    x, _, plan = CIFAR.make(torch.float32)
    index = torch.tensor([[1, 1], [4, 4], [0, 3]])
    y = branch_stage(x, Routes(index.int(), torch.ones(3, 2)), plan)
    assert torch.equal(y[0, 0], y[0, 1])
    assert_close(y, expected(x, index, plan), "y", scale=4.0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["CIFAR stage, strided, projection", "bottleneck stage"])
def test_any_number_of_threads_gives_the_same(threads, name):
    """Bit for bit, and as the images alone."""
    case = CASES[name]
    case = StageCase(case.build, case.channels, case.size, n=13, branches=7, k=3)
    x, index, plan = case.make(torch.float32)
    before = torch.get_num_threads()
    with pyeff.backend("cpp"):
        alone = torch.cat([branch_stage(x[i : i + 1], index[i : i + 1], plan) for i in range(13)])
        try:
            torch.set_num_threads(threads)
            assert torch.equal(branch_stage(x, index, plan), alone)
        finally:
            torch.set_num_threads(before)
    assert_close(alone, expected(x, index, plan), "y", scale=4.0)


def test_not_a_number_stays_one():
    m = Maker(2, 16, torch.float32)
    m.plan.max_pool2d(m.conv_act(0, 16, 16, 1), 1)
    x, index = torch.randn(1, 16, 3, 3), torch.zeros(1, 1, dtype=torch.int32)
    x[0, :, 1, 1] = torch.nan
    with pyeff.backend("cpp"):
        y = branch_stage(x, index, m.plan)
    assert y.isnan().nonzero()[:, 3:].unique(dim=0).tolist() == [[1, 1]]


# --- the plan -------------------------------------------------------------------------------------


def test_activations_and_additions_are_fused():
    _, _, plan = CIFAR.make(torch.float32)
    fused = BranchPlan.raised(*plan.lower())
    assert [s.kind for s in plan.steps].count("conv2d") == 7
    assert [s.kind for s in fused.steps] == ["conv2d"] * 7
    assert all(s.activation == "relu" for s in fused.steps if s.residual >= 0)
    assert sum(s.residual >= 0 for s in fused.steps) == 3


def test_fusing_keeps_what_others_read():
    _, _, plan = CASES["crossing"].make(torch.float32)
    fused = BranchPlan.raised(*plan.lower())
    assert len(fused.steps) < len(plan.steps)
    assert all(s.tensors[0].shape[1] != 5 for s in fused.steps if s.kind == "conv2d")
    again = BranchPlan.raised(*fused.lower())
    assert again.steps == fused.steps


def test_a_plan_counts_its_multiply_adds():
    _, _, plan = CIFAR.make(torch.float32)
    first, rest, shortcut = 9 * 32 * 16 * 64, 5 * 9 * 16 * 16 * 64, 32 * 16 * 64
    assert plan.multiply_adds((32, 16, 16)) == first + rest + shortcut
    assert plan.output_shape((32, 16, 16)) == (16, 8, 8)
    assert "BranchPlan(branches=5, in_channels=32: conv2d, activation" in repr(plan)


def test_a_plan_copies_inference_tensors():
    with torch.inference_mode():
        weight = torch.randn(3, 4, 8, 1, 1)
        plan = BranchPlan(3, 8)
        plan.conv2d(0, weight)
        x, index = torch.randn(2, 8, 3, 3), torch.zeros(2, 1, dtype=torch.int32)
        y = branch_stage(x, index, plan)
        with pyeff.backend("cpp"):
            same = torch.ops.pyeff.branch_stage(x, index, [weight], plan.lower()[1])
    assert not plan.parameters()[0].is_inference()
    assert_close(y, expected(x, index, plan), "y")
    assert torch.equal(same, y)


def test_a_plan_can_be_copied():
    x, index, plan = CIFAR.make(torch.float32)
    y = branch_stage(x, index, plan)
    copied = copy.deepcopy(plan)
    for t in plan.parameters():
        t.zero_()
    assert torch.equal(branch_stage(x, index, copied), y)


# --- packed parameters ----------------------------------------------------------------------------


def test_packed_parameters_follow_every_change():
    x, index, plan = CIFAR.make(torch.float32)
    first, last = plan.parameters()[0], plan.parameters()[-1]

    def check_now():
        with pyeff.backend("cpp"):
            y = branch_stage(x, index, plan)
        assert_close(y, expected(x, index, plan), "y", scale=10.0)

    check_now()
    last.add_(1)
    check_now()
    first.mul_(-0.5)
    check_now()
    last.set_(torch.randn_like(last))
    check_now()
    pyeff.clear_packed(last)
    check_now()


def test_packed_parameters_follow_a_fused_optimiser():
    x, index, _ = CIFAR.make(torch.float32)
    weight = torch.nn.Parameter(torch.randn(5, 4, 32, 1, 1))
    plan = BranchPlan(5, 32)
    plan.conv2d(0, weight)
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    for _ in range(3):
        with pyeff.backend("cpp"), torch.no_grad():
            assert_close(branch_stage(x, index, plan), expected(x, index, plan), "y", scale=10.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def test_packed_once_and_freed_with_the_plan():
    pyeff.clear_packed()
    x, index, plan = CIFAR.make(torch.float32)
    with pyeff.backend("cpp"):
        branch_stage(x, index, plan)
        packed = _entries.get(plan.parameters()[0])[0].plan.packed
        for size in (16, 9, 16):
            branch_stage(x[..., :size, :size], index, plan)
    assert len(_entries) == 1
    assert _entries.get(plan.parameters()[0])[0].plan.packed is packed
    del plan
    gc.collect()
    assert len(_entries) == 0


# --- registration, compilers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CIFAR stage, strided, projection", "pooling", "vectors"])
def test_is_registered_correctly(name):
    x, index, plan = CASES[name].make(torch.float32)
    torch.library.opcheck(torch.ops.pyeff.branch_stage.default, (x, index, *plan.lower()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_batch(backend):
    torch._dynamo.reset()
    _, _, plan = CIFAR.make(torch.float32)
    run = lambda x, index: branch_stage(x, index, plan) + 1  # noqa: E731
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 5):
        x, index, _ = StageCase(CIFAR.build, 32, (16, 16), n=n).make(torch.float32)
        torch.testing.assert_close(compiled(x, index), branch_stage(x, index, plan) + 1)


def test_exports():
    class Stage(torch.nn.Module):
        def __init__(self, plan):
            super().__init__()
            self.plan = plan

        def forward(self, x, index):
            return branch_stage(x, index, self.plan)

    x, index, plan = CIFAR.make(torch.float32)
    program = torch.export.export(Stage(plan), (x, index))
    torch.testing.assert_close(program.module()(x, index), branch_stage(x, index, plan))


def test_shapes_without_values():
    x, index, plan = CASES["bottleneck stage"].make(torch.float32)
    meta = BranchPlan.raised([t.to("meta") for t in plan.lower()[0]], plan.lower()[1])
    y = branch_stage(x.to("meta"), index.to("meta"), meta)
    assert y.is_meta
    assert y.shape == (2, 2, 48, 7, 7)


def test_flops_are_counted():
    x, index, plan = CIFAR.make(torch.float32)
    with FlopCounterMode(display=False) as counter:
        branch_stage(x, index, plan)
    assert counter.get_total_flops() == 2 * 6 * plan.multiply_adds((32, 16, 16))


def test_autocast_leaves_the_parameters_alone():
    x, index, plan = CIFAR.make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = branch_stage(x.bfloat16(), index, plan)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected(x.bfloat16(), index, plan), "y", scale=4.0)


def test_has_no_gradient():
    m = Maker(3, 4, torch.float32)
    residual_stage(m, 4, 4, 1, "identity", 1)
    x, index = torch.randn(1, 4, 5, 5), torch.zeros(1, 2, dtype=torch.int32)
    message = "branch_stage: x and the plan's parameters must not need a gradient"
    with pytest.raises(NotImplementedError, match=message):
        branch_stage(x.requires_grad_(), index, m.plan)
    recorded = torch.ops.pyeff.branch_stage(x, index, *m.plan.lower())
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(recorded.sum(), x)
    m.plan.parameters()[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=message):
        branch_stage(x.detach(), index, m.plan)
    with torch.no_grad():
        branch_stage(x, index, m.plan)
