"""What branch_stage and BranchPlan refuse, and with which words."""

import contextlib

import pytest
import torch

import pyeff
from pyeff import _C
from pyeff.ops import BranchPlan, branch_stage


def plan_of(branches=3, channels=4, vector=False):
    plan = BranchPlan(branches, channels, vector=vector)
    if vector:
        plan.linear(0, torch.randn(branches, 2, channels))
    else:
        plan.conv2d(0, torch.randn(branches, 2, channels, 3, 3))
    return plan


def pooled_plan():
    plan = BranchPlan(3, 4)
    plan.adaptive_pool2d(plan.activation(0, "relu"), 1)
    return plan


def call(x=(2, 4, 5, 5), index=((0, 2), (1, 1)), plan=None):
    x = torch.randn(x) if isinstance(x, tuple) else x
    index = torch.tensor(index) if isinstance(index, tuple) else index
    return branch_stage(x, index, plan or plan_of())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(4, 5, 5)), r"x must be \[N, C, H, W\] or \[N, k, C, H, W\], got \[4, 5, 5\]"),
        (dict(x=(2, 4), plan=plan_of(vector=True), index=((0,), (3,))), "names? branch"),
        (dict(x=(2, 4, 5, 5), plan=plan_of(vector=True)), r"x must be \[N, F\] or \[N, k, F\]"),
        (dict(x=(2, 3, 5, 5)), r"x must give every branch \[4, H, W\], got \[3, 5, 5\]"),
        (dict(x=(2, 4, 0, 5)), r"x must have maps of at least one pixel, got \[4, 0, 5\] a branch"),
        (dict(x=(2, 4, 5, 0), plan=pooled_plan()), "x must have maps of at least one pixel"),
        (dict(x=(2, 4, 2, 5)), r"x must be large enough for the \[3, 3\] kernel of every step"),
        (dict(x=(2, 3, 4, 5, 5)), "x must have one input for each of 2 routes"),
        (dict(x=(3, 4, 5, 5)), "routes.index must have a row for each of 3 images"),
        (dict(x=torch.randn(2, 4, 5, 5).double()), "plan must have parameters of the dtype of x"),
        (dict(x=torch.randn(2, 4, 5, 5, device="meta")), "plan must have its parameters on the"),
        (dict(index=((0, 3), (1, 1))), "routes.index must name branches 0 to 2, got 3"),
        (dict(index=((0, -1), (1, 1))), "routes.index must name branches .*got -1"),
        (dict(index=(0, 1)), r"routes.index must be \[N, k\]"),
        (dict(plan=BranchPlan(3, 4)), "plan must have at least one step, got none"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    for backend in ("reference", "torch", "cpp"):
        with pyeff.backend(backend), pytest.raises(ValueError, match=f"branch_stage: .*{message}"):
            call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1]), "x must be a tensor, got list"),
        (dict(x=torch.zeros(2, 4, 5, 5, dtype=torch.int64)), "x must be a floating-point tensor"),
        (dict(index=torch.rand(2, 2)), "routes must be Routes or an int32 or int64 tensor"),
        (dict(plan=torch.nn.ReLU()), "plan must be a BranchPlan, got ReLU"),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"branch_stage: {message}"):
        call(**arguments)


def test_sizes_that_only_the_input_decides():
    plan = BranchPlan(2, 4)
    plan.linear(plan.flatten(0), torch.randn(2, 3, 36))
    with pytest.raises(ValueError, match=r"x must give linear steps their 36 features, got \[64\]"):
        call((2, 4, 4, 4), ((0,), (1,)), plan)
    plan = BranchPlan(2, 4)
    plan.scale_shift(plan.flatten(0), torch.randn(2, 36), torch.randn(2, 36))
    with pytest.raises(ValueError, match=r"x must give 36 features to be scaled, got \[64\]"):
        call((2, 4, 4, 4), ((0,), (1,)), plan)
    for join, words in (("add", "added"), ("concat", "concatenated")):
        plan = BranchPlan(2, 4)
        half = plan.max_pool2d(0, 2)
        plan.add(half, 0) if join == "add" else plan.concat([half, 0])
        with pytest.raises(ValueError, match=f"x must give maps of one size to be {words}"):
            call((2, 4, 4, 4), ((0,), (1,)), plan)


WEIGHT = torch.randn(3, 6, 4, 3, 3)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("conv2d", (1, WEIGHT), "source must be a slot from 0 to 0, got 1"),
        ("conv2d", (0, WEIGHT[:2]), r"weight must be \[3, any, any, any, any\], got \[2, 6"),
        ("conv2d", (0, WEIGHT[:, :, :3]), r"weight must be \[3, O, 4, kh, kw\] for slot 0"),
        ("conv2d", (0, WEIGHT, torch.randn(3, 5)), r"bias must be \[3, 6\], got \[3, 5\]"),
        ("conv2d", (0, WEIGHT, torch.randn(3, 6).double()), "all parameters must share one dtype"),
        ("linear", (0, torch.randn(3, 2, 4)), "source must be a vector, got a map"),
        ("scale_shift", (0, torch.randn(3, 4), torch.randn(3, 5)), r"shift must be \[3, 4\]"),
        ("activation", (0, "gelu"), "name must be one of relu, relu6, silu, hardswish, got 'gelu'"),
        ("add", (0, 2), "source must be a slot from 0 to 0, got 2"),
        ("max_pool2d", (0, 0), "kernel must be at least 1, got 0"),
        ("adaptive_pool2d", (0, 0), "size must be at least 1, got 0"),
        ("concat", ([],), "sources must name at least one slot"),
        ("returns", (True,), "source must be a slot"),
    ],
)
def test_a_plan_refuses_what_does_not_fit(method, arguments, message):
    plan = BranchPlan(3, 4)
    with pytest.raises(ValueError, match=f"BranchPlan.*: {message}"):
        getattr(plan, method)(*arguments)
    assert plan.steps == []


def test_a_plan_refuses_the_rest():
    with pytest.raises(ValueError, match="BranchPlan: branches must be an int from 1 on, got 0"):
        BranchPlan(0, 4)
    with pytest.raises(ValueError, match=r"in_channels must be an int from 1 on, got 2\.5"):
        BranchPlan(1, 2.5)
    plan = BranchPlan(3, 4)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor, got list"):
        plan.conv2d(0, [1])
    with pytest.raises(TypeError, match=r"weight must be .*, got torch\.int64"):
        plan.conv2d(0, WEIGHT.long())
    with pytest.raises(ValueError, match="groups must divide the 4 input and 6 output channels"):
        plan.conv2d(0, WEIGHT, groups=4)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        plan.conv2d(0, WEIGHT, stride=0)
    with pytest.raises(ValueError, match="padding must be at most half of the kernel"):
        plan.max_pool2d(0, 3, padding=2)
    vector = plan.flatten(0)
    with pytest.raises(ValueError, match="both slots must have one shape"):
        plan.add(0, vector)
    with pytest.raises(ValueError, match="all maps or all vectors"):
        plan.concat([0, vector])
    with pytest.raises(ValueError, match="source must be a map, got a vector"):
        plan.conv2d(vector, WEIGHT)


def test_backends_are_asked_for_by_name():
    with pyeff.backend("cuda"), pytest.raises(ValueError, match="cuda must get CUDA tensors"):
        call()


# --- the operator below, which checks for itself --------------------------------------------------


def test_the_operator_refuses_programs_that_are_none():
    x, index = torch.randn(1, 4, 5, 5), torch.zeros(1, 1, dtype=torch.int32)
    tensors, program = plan_of().lower()
    for wrong in ([], [2], program[:-1], [1, 4, *program[2:9]]):
        with pytest.raises(ValueError, match="branch_stage: program must"):
            torch.ops.pyeff.branch_stage(x, index, tensors, wrong)


@pytest.mark.parametrize("seed", range(200))
def test_the_native_program_refuses_or_runs_whatever_it_is_given(seed):
    """Never crashes: a program either is refused or reads only what was written before."""
    generator = torch.Generator().manual_seed(seed)
    tensors, program = plan_of().lower()
    program = list(program)
    for _ in range(2):
        at = int(torch.randint(len(program), (1,), generator=generator))
        program[at] = int(torch.randint(-2, 6, (1,), generator=generator))
    x, index = torch.randn(1, 4, 5, 5), torch.zeros(1, 1, dtype=torch.int32)
    y = torch.empty(1, 1, 3, 3, 2).permute(0, 1, 4, 2, 3)
    with contextlib.suppress(ValueError):
        native = _C.BranchStageProgram(program)
        packed = torch.empty(native.packed_elements)
        _C.branch_stage_pack(native, tensors, packed, 1)
        _C.branch_stage_forward(native, x, index, packed, y, 1)


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32, 2**63 - 1])
def test_the_native_program_refuses_numbers_that_are_no_int(number):
    """A slot, or the number of a tensor, that wraps around would be read outside of its array."""
    _, program = plan_of().lower()
    for at in (5, len(program) - 2):  # the slot that is returned, the weight of the last step
        with pytest.raises(
            ValueError, match=f"program must have a number .* at {at}, got {number}"
        ):
            _C.BranchStageProgram([*program[:at], number, *program[at + 1 :]])


def test_the_native_function_checks_what_keeps_memory_safe():
    tensors, program = plan_of().lower()
    native = _C.BranchStageProgram(program)
    packed = torch.empty(native.packed_elements)
    _C.branch_stage_pack(native, tensors, packed, 1)
    x, index = torch.randn(1, 4, 5, 5), torch.zeros(1, 1, dtype=torch.int32)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, 1, 3, 3, 2).permute(0, 1, 4, 2, 3)
    good = dict(x=x, index=index, packed=packed, y=y, threads=1)
    _C.branch_stage_forward(native, **good)
    for bad, message in (
        (dict(x=x.contiguous(memory_format=torch.contiguous_format)), "channels side by side"),
        (dict(x=x[:, :3]), "x must have the channels of the program"),
        (dict(x=x.double()), "y must have the dtype of x"),
        (dict(x=x[0]), "x must have the rank of the program"),
        (dict(index=index + 3), "must name branches from 0 to 2, got 3"),
        (dict(index=index - 1), "must name branches from 0 to 2, got -1"),
        (dict(index=index.long()), "index must be int32"),
        (dict(index=index.repeat(2, 1)), "index must have shape"),
        (dict(index=index[0]), r"index must be \[N, k\]"),
        (dict(packed=packed[1:]), "packed must have shape"),
        (dict(packed=packed.double()), "packed must be float32, or float64 for a float64 x"),
        (dict(y=y.contiguous()), "y must be contiguous"),
        (dict(y=y[..., :2]), "y must have shape"),
        (dict(threads=0), "threads must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.branch_stage_forward(native, **{**good, **bad})
    with pytest.raises(ValueError, match="tensors must have shape"):
        _C.branch_stage_pack(native, [tensors[0][:2]], packed, 1)
    with pytest.raises(ValueError, match="tensors must be those of the program"):
        _C.branch_stage_pack(native, [], packed, 1)
