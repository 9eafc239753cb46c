"""branch_stage: the persistent CUDA kernel on the host."""

import pytest
import torch
from numerics import assert_close, in_layout
from ops import test_branch_stage as cases
from ops.stage_cases import CASES, Maker, StageCase, random_case, residual_stage

import pyeff
from pyeff.ops import _branch_stage_op, branch_stage

OPERATORS = ("branch_stage",)
CIFAR = CASES["CIFAR stage, strided, projection"]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(simt, case, dtype):
    cases.check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_branches(simt, dtype):
    for seed in range(12):
        cases.check(random_case(seed), dtype, "cuda", f"seed {seed}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_inputs_with_float32_parameters(simt, dtype):
    cases.check(CIFAR, dtype, "cuda", parameters=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_order_of_threads_changes_nothing(simt, dtype):
    x, index, plan = CIFAR.make(dtype)
    results = []
    with pyeff.backend("cuda"):
        for reverse in (False, True):
            simt.set_reverse(reverse)
            results.append(branch_stage(x, index, plan))
    assert torch.equal(*results)


def test_blocks_take_one_pair_after_the_other(simt):
    case = StageCase(lambda m: m.conv_act(0, 8, 8, 3, padding=1), 8, (5, 6), n=5, k=3)
    x, index, plan = case.make(torch.float32)
    with pyeff.backend("cuda"):
        for multiprocessors in (1, 100):
            simt.set_multiprocessors(multiprocessors)
            assert_close(branch_stage(x, index, plan), cases.expected(x, index, plan), "y")
    few, many = simt.launches()
    assert few["grid"][0] < 15
    assert many["grid"] == (15, 1, 1)
    assert {r["stream"] for r in (few, many)} == {0x517}


@pytest.mark.parametrize("layout", ["contiguous", "slice of channels_last", "slice of rows"])
def test_accepts_any_layout(simt, layout):
    x, index, plan = CASES["bottleneck stage, uneven channels"].make(torch.float32)
    with pyeff.backend("cuda"):
        y = branch_stage(in_layout(x, layout), index, plan)
    assert_close(y, cases.expected(x, index, plan), layout, scale=4.0)


@pytest.mark.parametrize("name", ["residual stage, option A, odd sizes", "vectors"])
def test_one_input_for_every_pair(simt, name):
    cases.test_one_input_for_every_pair(name, "cuda")


def test_not_a_number_stays_one(simt):
    m = Maker(2, 16, torch.float32)
    m.plan.max_pool2d(m.conv_act(0, 16, 16, 1), 1)
    x, index = torch.randn(1, 16, 3, 3), torch.zeros(1, 1, dtype=torch.int32)
    x[0, :, 1, 1] = torch.nan
    with pyeff.backend("cuda"):
        y = branch_stage(x, index, m.plan)
    assert y.isnan().nonzero()[:, 3:].unique(dim=0).tolist() == [[1, 1]]


def test_packed_parameters_follow_every_change(simt):
    x, index, plan = CASES["residual stage, identity shortcuts"].make(torch.float32)
    with pyeff.backend("cuda"), torch.no_grad():
        for change in (lambda t: None, lambda t: t.mul_(0.5)):
            for tensor in plan.parameters():
                change(tensor)
            for _ in range(2):
                y = branch_stage(x, index, plan)
            assert_close(y, cases.expected(x, index, plan), "y", scale=4.0)


def test_a_route_to_no_branch_gives_zeros(simt, monkeypatch):
    x, index, plan = CIFAR.make(torch.float32)
    index[0], index[1, 1] = torch.tensor([-1, 5]), 2**31 - 1
    exists = (index >= 0) & (index < 5)
    want = cases.expected(x, index.clamp(0, 4), plan) * exists[..., None, None, None]
    module = __import__("pyeff.ops.branch_stage", fromlist=["route_index"])
    monkeypatch.setattr(module, "route_index", lambda _, index, *__, **___: index)
    monkeypatch.setattr(module, "kernel_index", lambda _, index, *__: index, raising=False)
    monkeypatch.setattr(_branch_stage_op, "kernel_index", lambda _, index, *__: index)
    with pyeff.backend("cuda"):
        assert_close(branch_stage(x, index, plan), want, "y", scale=4.0)


def test_refuses_maps_that_do_not_fit(simt):
    case = StageCase(lambda m: residual_stage(m, 64, 64, 1, "identity", 1), 64, (40, 40), n=1)
    x, index, plan = case.make(torch.float32)
    message = "branch_stage: backend cuda: the maps of a branch need .* bytes of shared memory"
    with pyeff.backend("cuda"), pytest.raises(NotImplementedError, match=message):
        branch_stage(x, index, plan)


def test_refuses_too_many_steps(simt):
    def build(m):
        slot = 0
        for _ in range(33):
            slot = m.plan.add(m.conv(slot, 4, 4, 1), slot)
            slot = m.norm(slot, 4)

    x, index, plan = StageCase(build, 4, (2, 2), n=1, k=1).make(torch.float32)
    message = "branch_stage: backend cuda: plan has too many steps"
    with pyeff.backend("cuda"), pytest.raises(NotImplementedError, match=message):
        branch_stage(x, index, plan)
