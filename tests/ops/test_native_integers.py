"""Integers given to pyeff._C itself: no number ends the process, or is read as another one."""

import re

import pytest
import torch

from pyeff import _C
from pyeff.ops import BranchPlan

LARGEST = 2**31 - 1
TOO_LARGE = (LARGEST + 1, 2**32 + 1, 2**63 - 1)
WINDOW = (1, 1, 1, 1, 1, 1)
C, SIZE = 32, 32  # enough work for threads to be started


def maps(*outer):
    """[..., C, SIZE, SIZE] with the channels innermost."""
    return torch.randn(*outer, SIZE, SIZE, C).movedim(-1, -3)


def routes():
    return torch.tensor([[1, 0], [0, 2]], dtype=torch.int32)


def nested(kind):
    def call(window=WINDOW, groups=1, threads=1, span=(0, C)):
        weight, x, y = torch.randn(C, C // max(1, min(groups, C)), 3, 3), maps(1), maps(1)
        problem = (*span, 0, C, *window, groups, threads)
        if kind == "forward":
            _C.nested_conv2d_forward(x, weight, None, None, y, None, None, problem)
            return y
        if kind == "grad_input":
            _C.nested_conv2d_grad_input(y, weight, x, None, None, problem)
            return x
        _C.nested_conv2d_grad_weight(y, x, weight, None, None, problem)
        return weight

    return call


def branch(kind):
    def call(window=WINDOW, groups=1, threads=1):
        weight, x, y = torch.randn(3, C, C // max(1, min(groups, C)), 3, 3), maps(2), maps(2, 2)
        problem = (*window, groups, threads, 0)
        if kind == "forward":
            _C.branch_conv2d_forward(x, weight, None, None, routes(), y, problem)
            return y
        if kind == "grad_input":
            _C.branch_conv2d_grad_input(y, weight, routes(), x, problem)
            return x
        _C.branch_conv2d_grad_weight(y, x, routes(), weight, None, problem)
        return weight

    return call


def factorized(kind):
    def call(line=(1, 1, 1), threads=1):
        first, second = torch.randn(C, C, 3, 1), torch.randn(C, C, 1, 3)
        x, y, nothing = maps(2), maps(2), (None,) * 3
        problem = (*line, 0, 0, 0, threads)
        if kind == "pair":
            _C.factorized_conv2d_forward(
                x, first, None, None, second, None, None, *nothing, y, problem
            )
            return y
        if kind == "line":
            _C.factorized_conv2d_line_forward(x, first, None, None, *nothing, y, problem)
            return y
        if kind == "grad_input":
            _C.factorized_conv2d_line_grad_input(y, first, None, x, problem)
            return x
        _C.factorized_conv2d_line_grad_weight(y, x, first, None, problem)
        return first

    return call


def combine(kind):
    def call(threads=1):
        n, k, branches, outputs, features = 64, 2, 3, 128, 256
        y, projection = torch.randn(n, k, features), torch.randn(branches, outputs, features)
        out, weight = torch.randn(n, outputs), torch.rand(n, k)
        index = torch.randint(branches, (n, k), dtype=torch.int32)
        if kind == "forward":
            _C.combine_forward(y, projection, None, None, index, weight, out, threads)
            return out
        if kind == "grad_input":
            grad = torch.empty_like(y)
            _C.combine_grad_input(out, y, projection, index, weight, grad, None, threads)
            return grad
        _C.combine_grad_projection(out, y, index, weight, projection, threads)
        return projection

    return call


def pack(kind):
    def call(groups=1, threads=1):
        packs = {"nested": (512, 512), "branch": (4, 512, 128)}
        weight = torch.randn(*packs[kind], 3, 3)
        elements = getattr(_C, f"{kind}_conv2d_packed_elements")(weight, groups)
        packed = torch.zeros(elements)
        getattr(_C, f"{kind}_conv2d_pack")(weight, packed, groups, threads)
        return packed

    return call


def stage(kind):
    def call(threads=1):
        plan = BranchPlan(64, C)
        plan.conv2d(0, torch.randn(64, C, C, 3, 3), padding=1)
        tensors, program = plan.lower()
        native = _C.BranchStageProgram(program)
        packed = torch.empty(native.packed_elements)
        _C.branch_stage_pack(native, tensors, packed, threads if kind == "pack" else 1)
        y = maps(2, 2)
        _C.branch_stage_forward(
            native, maps(2), routes(), packed, y, threads if kind == "forward" else 1
        )
        return y

    return call


DIRECTIONS = ("forward", "grad_input", "grad_weight")
CONVOLUTIONS = {
    **{f"nested_conv2d, {kind}": nested(kind) for kind in DIRECTIONS},
    **{f"branch_conv2d, {kind}": branch(kind) for kind in DIRECTIONS},
}
LINES = {
    f"factorized_conv2d, {kind}": factorized(kind)
    for kind in ("pair", "line", "grad_input", "grad_weight")
}
PACKS = {f"{kind}_conv2d, pack": pack(kind) for kind in ("nested", "branch")}
THREADED = {
    **CONVOLUTIONS,
    **LINES,
    **PACKS,
    **{f"combine, {kind}": combine(kind) for kind in DIRECTIONS},
    **{f"branch_stage, {kind}": stage(kind) for kind in ("pack", "forward")},
}


def refused(name, number, lowest):
    """What a call that gets this number must raise."""
    words = f"{name} must be at least {lowest} and at most {LARGEST}, got {number}"
    return pytest.raises(ValueError, match=re.escape(words))


@pytest.mark.parametrize("call", THREADED.values(), ids=THREADED.keys())
def test_any_number_of_threads_gives_the_same(call):
    results = []
    for threads in (1, 3, LARGEST):
        torch.manual_seed(0)
        results.append(call(threads=threads))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("call", THREADED.values(), ids=THREADED.keys())
def test_numbers_of_threads_that_are_none(call):
    for threads in (0, -1, *TOO_LARGE):
        with refused("threads", threads, 1):
            call(threads=threads)


@pytest.mark.parametrize(
    "call", [*CONVOLUTIONS.values(), *PACKS.values()], ids=[*CONVOLUTIONS, *PACKS]
)
def test_numbers_of_groups(call):
    for groups in (0, -1, *TOO_LARGE):
        with refused("groups", groups, 1):
            call(groups=groups)
    for groups in (LARGEST, 3 * C):
        with pytest.raises(ValueError, match="groups must divide the weight's output channels"):
            call(groups=groups)


@pytest.mark.parametrize("call", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_windows(call):
    for at, (name, lowest) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1))):
        for side in (0, 1):
            for number in (lowest - 1, *TOO_LARGE):
                window = list(WINDOW)
                window[2 * at + side] = number
                with refused(name, number, lowest):
                    call(window=window)


@pytest.mark.parametrize("call", LINES.values(), ids=LINES.keys())
def test_windows_of_lines(call):
    for at, (name, lowest) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1))):
        for number in (lowest - 1, *TOO_LARGE):
            line = [1, 1, 1]
            line[at] = number
            with refused(name, number, lowest):
                call(line=line)


@pytest.mark.parametrize("call", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_what_is_no_integer_of_64_bits(call):
    with pytest.raises(OverflowError):
        call(threads=2**63)
    with pytest.raises(TypeError):
        call(threads=1.5)


@pytest.mark.parametrize("span", [(2**63 - 1, C), (-1, C), (1, C), (0, -C)])
def test_ranges_lie_within_the_weight(span):
    with pytest.raises(ValueError, match="a range must lie within the channels of the weight"):
        nested("forward")(span=span)


def test_weights_without_channels():
    """With none, any number of groups would divide them."""
    x, y = torch.empty(2, 0, 3, 3), torch.empty(2, 2, 0, 3, 3)
    for shape in ((3, 0, 4, 1, 1), (3, 4, 0, 1, 1), (3, 4, 4, 0, 1), (0, 4, 4, 1, 1)):
        weight = torch.empty(shape)
        message = "weight must have branches, channels and a kernel"
        with pytest.raises(ValueError, match=message):
            _C.branch_conv2d_forward(x, weight, None, None, routes(), y, (*WINDOW, LARGEST, 1, 0))
        with pytest.raises(ValueError, match=message):
            _C.branch_conv2d_packed_elements(weight, LARGEST)
    with pytest.raises(ValueError, match="weight must have channels in every group"):
        _C.nested_conv2d_forward(
            x, torch.empty(0, 4, 1, 1), None, None, x, None, None, (0, 0, 0, 0, *WINDOW, 7, 1)
        )


@pytest.mark.parametrize("groups", [3, LARGEST - 1])
def test_groups_of_a_program_divide_its_channels(groups):
    plan = BranchPlan(2, 4)
    plan.conv2d(0, torch.randn(2, 8, 2, 1, 1), groups=2)
    _, program = plan.lower()
    before, last, after = program[:-4], program[-4], program[-3:]  # the tensors follow
    assert last == 2
    with pytest.raises(ValueError, match="program must have groups that divide the channels"):
        _C.BranchStageProgram([*before, groups, *after])


def test_the_loop_that_measures_the_peak():
    assert _C.run_fma_loop(1, LARGEST) > 0
    for threads in (0, *TOO_LARGE):
        with refused("threads", threads, 1):
            _C.run_fma_loop(1, threads)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        _C.run_fma_loop(0, 1)
