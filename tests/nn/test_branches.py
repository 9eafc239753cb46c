import copy
import pickle
import warnings

import branch_templates as cases
import pytest
import torch
from numerics import assert_close
from torch import nn

import pyeff
from pyeff.nn import BranchBatchNorm2d, BranchConv2d, Branches, synchronise_batch_norm
from pyeff.ops import BranchPlan, Routes
from pyeff.ops import branch_stage as stage_op

N, B, K = 6, 5, 3


def images(n=N, dtype=torch.float64):
    return torch.randn(n, cases.CHANNELS, cases.SIZE, cases.SIZE, dtype=dtype)


@pytest.mark.parametrize("name", cases.TEMPLATES)
def test_eval_equals_the_copies_one_by_one(name):
    branches = cases.branches_of(name).eval()
    x, routes = images(), cases.some_routes(N, B, K)
    expected = cases.one_by_one(cases.copies_of(branches), x, routes)
    assert_close(branches(x, routes), expected.detach(), name)
    with torch.no_grad():
        assert_close(branches(x, routes), expected.detach(), f"{name}, as one plan")


@pytest.mark.parametrize("name", cases.TEMPLATES)
def test_training_equals_the_copies_on_their_images(name):
    branches = cases.branches_of(name).train()
    copies = cases.copies_of(branches)
    x, routes = images().requires_grad_(), cases.some_routes(N, B, K)
    twin = x.detach().clone().requires_grad_()
    y, expected = branches(x, routes), cases.branch_by_branch(copies, twin, routes)
    assert_close(y, expected.detach(), name)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert_close(x.grad, twin.grad, f"{name}, gradient for x")
    for key, value in branches.state_dict().items():
        assert_close(value.double(), copies.state_dict()[key].double(), f"{name}, {key}")
    for key, parameter in branches.stack.named_parameters():
        for branch, single in enumerate(copies):
            there = single.get_parameter(key).grad
            there = torch.zeros_like(parameter[branch]) if there is None else there
            assert_close(parameter.grad[branch], there, f"{name}, gradient for {branch}.{key}")


def test_a_branch_that_nobody_chose_gets_zero_gradients_and_keeps_its_statistics():
    branches = cases.branches_of("basic").train()
    before = copy.deepcopy(branches.state_dict())
    index = torch.tensor([[0, 1], [1, 3]])
    branches(images(2), Routes(index, torch.ones(2, 2))).sum().backward()
    for parameter in branches.parameters():
        assert torch.equal(parameter.grad[[2, 4]], torch.zeros_like(parameter[[2, 4]]))
    after = branches.state_dict()
    for key in [key for key in after if "running" in key or "tracked" in key]:
        assert torch.equal(after[key], before[key]) == (key[0] in "24"), key


@pytest.mark.parametrize("name", ["basic padded", "dense", "separable", "reshaped"])
def test_state_dict_is_that_of_a_module_list(name):
    branches = cases.branches_of(name)
    copies = nn.ModuleList(cases.TEMPLATES[name]() for _ in range(B)).double()
    assert list(branches.state_dict()) == list(copies.state_dict())
    assert set(branches.state_dict()._metadata) >= {
        key for key in copies.state_dict()._metadata if key.endswith(("norm", "conv"))
    }
    branches.load_state_dict(copies.state_dict())
    for key, value in copies.state_dict().items():
        assert torch.equal(branches.state_dict()[key], value), key
    other = cases.branches_of(name)
    copies.load_state_dict(other.state_dict())
    for key, value in copies.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_state_dict_inside_another_module_and_by_assignment():
    model = nn.ModuleDict({"head": cases.branches_of("conv"), "fc": nn.Linear(2, 2)})
    assert "head.4.weight" in model.state_dict()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model["head"].stack.weight[4], state["head.4.weight"])
    with torch.device("meta"):
        empty = nn.ModuleDict({"head": cases.branches_of("conv"), "fc": nn.Linear(2, 2)})
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty["head"].stack.weight, model["head"].stack.weight)


def test_strict_loading_names_what_is_wrong_in_the_copies():
    branches = cases.branches_of("basic")
    before = branches.state_dict()["3.conv1.weight"].clone()
    state = dict(branches.state_dict())
    del state["3.conv1.weight"]
    state["2.norm1.weight"] = torch.ones(3)
    state["5.conv1.weight"] = state["0.conv1.weight"]
    with pytest.raises(RuntimeError) as error:
        branches.load_state_dict(state)
    message = str(error.value)
    assert 'Missing key(s) in state_dict: "3.conv1.weight"' in message
    assert 'Unexpected key(s) in state_dict: "5.conv1.weight"' in message
    assert "size mismatch for 2.norm1.weight" in message
    assert "stack" not in message
    del state["2.norm1.weight"]
    state["0.conv1.weight"] = torch.zeros_like(state["0.conv1.weight"])
    missing, unexpected = branches.load_state_dict(state, strict=False)
    assert missing == ["3.conv1.weight", "2.norm1.weight"] or set(missing) == {
        "3.conv1.weight",
        "2.norm1.weight",
    }
    assert unexpected == ["5.conv1.weight"]
    assert torch.equal(branches.stack.conv1.weight[3], before)
    assert not branches.stack.conv1.weight[0].any()


def test_copies_start_independently_and_as_the_template_would():
    branches = Branches(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)), 6)
    weight = branches.stack.get_submodule("0").weight
    flat = weight.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(6)
    assert correlation.abs().max() < 0.05
    deviation = nn.Conv2d(64, 64, 3).weight.std()
    torch.testing.assert_close(flat.std(1), deviation.expand(6), rtol=0.02, atol=0)
    assert torch.equal(branches.stack.get_submodule("1").running_var, torch.ones(6, 64))


def test_init_is_called_on_every_copy():
    def init(copy_):
        nn.init.normal_(copy_.weight, std=3.0)

    branches = Branches(nn.Conv2d(16, 16, 3), 4, init=init)
    deviations = branches.stack.weight.flatten(1).std(1)
    torch.testing.assert_close(deviations, torch.full((4,), 3.0), rtol=0.1, atol=0)
    assert not torch.equal(branches.stack.weight[0], branches.stack.weight[1])


def test_template_keeps_its_weights_and_frozen_parameters_stay_frozen():
    template = nn.Conv2d(2, 2, 1)
    template.bias.requires_grad_(False)
    before = template.weight.clone()
    branches = Branches(template, 3)
    assert torch.equal(template.weight, before)
    assert branches.stack.weight.requires_grad
    assert not branches.stack.bias.requires_grad


def test_copy_of_is_one_branch():
    branches = cases.branches_of("basic").eval()
    x = images()
    routes = Routes(torch.full((N, 1), 3), torch.ones(N, 1))
    assert_close(branches(x, routes)[:, 0], branches.copy_of(3)(x).detach(), "copy_of")
    with pytest.raises(ValueError, match=r"branch must be in 0\.\.4, got 5"):
        branches.copy_of(5)


def test_plan_is_rebuilt_when_a_weight_or_a_statistic_changes():
    branches = cases.branches_of("basic").eval()
    x, routes = images(), cases.some_routes(N, B, K)

    def check(what):
        expected = cases.one_by_one(cases.copies_of(branches), x, routes)
        assert_close(branches(x, routes), expected, what)

    with torch.no_grad():
        check("first")
        held = branches._planned._held
        check("again")
        assert branches._planned._held is held
        branches.stack.conv1.weight.mul_(2)
        check("after a weight changed")
        branches.stack.norm2.running_var.mul_(3)
        check("after a statistic changed")
        branches.load_state_dict(cases.branches_of("basic").state_dict())
        check("after loading")
    optimizer = torch.optim.Adam(branches.parameters(), lr=0.1, fused=True)
    branches(x, routes).sum().backward()
    optimizer.step()
    with torch.no_grad():
        check("after a fused step")
        branches.stack.conv1.weight.data.mul_(2)  # which no version shows
        pyeff.clear_packed()
        check("after clear_packed")
    branches.train()(x, routes)
    branches.eval()
    with torch.no_grad():
        check("after training mode")


def test_inference_mode():
    branches = cases.branches_of("basic padded").eval()
    x, routes = images(), cases.some_routes(N, B, K)
    with torch.inference_mode():
        y = branches(x, routes)
    assert_close(y.clone(), cases.one_by_one(cases.copies_of(branches), x, routes).detach(), "y")


def test_eval_with_a_gradient_runs_the_operators(monkeypatch):
    def refuse(*_):
        raise AssertionError("branch_stage was called")

    monkeypatch.setattr("pyeff.nn.branches.branch_stage", refuse)
    branches = cases.branches_of("basic").eval()
    branches(images(), cases.some_routes(N, B, K)).sum().backward()
    assert branches.stack.conv1.weight.grad.abs().sum() > 0
    branches.requires_grad_(False)
    x = images().requires_grad_()
    branches(x, cases.some_routes(N, B, K)).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="branch_stage was called"):
        branches(images(), cases.some_routes(N, B, K))


def test_plan_folds_norms_and_runs_by_itself():
    branches = cases.branches_of("basic").eval()
    plan = branches.plan()
    assert isinstance(plan, BranchPlan)
    assert {step.kind for step in plan.steps} == {"conv2d", "activation", "add"}
    x, routes = images(), cases.some_routes(N, B, K)
    with torch.no_grad():
        assert_close(stage_op(x, routes, plan), branches._run(x, routes), "plan")


def test_plan_in_half_precision_is_made_of_float32():
    branches = cases.branches_of("basic", dtype=torch.bfloat16).eval()
    assert {t.dtype for t in branches.plan().parameters()} == {torch.float32}
    x, routes = images(dtype=torch.bfloat16), cases.some_routes(N, B, K)
    with torch.no_grad():
        wide = Branches(branches.template("cpu"), B).double().eval()
        wide.load_state_dict(branches.state_dict())
        assert_close(branches(x, routes), wide(x.double(), routes), "bfloat16")


def test_what_no_plan_holds_is_said_once_and_runs_all_the_same():
    branches = Branches(cases.Gated(), B).double().eval()
    x, routes = images(), cases.some_routes(N, B, K)
    expected = cases.one_by_one(cases.copies_of(branches), x, routes).detach()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="operator by operator in inference.*call of sigmoid"):
            assert_close(branches(x, routes), expected, "operator by operator")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            branches(x, routes)
    with pytest.raises(ValueError, match="call of sigmoid"):
        branches.plan()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), "GELU at '1'"),
        (lambda: nn.Sequential(nn.ReLU()), "layers do not tell how many channels"),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.AvgPool2d(2, divisor_override=3)),
            "divisor of its own",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d((None, 1))),
            "keeps a side",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)),
            "batch statistics at '1'",
        ),
    ],
)
def test_why_there_is_no_plan(template, reason):
    with pytest.raises(ValueError, match=reason):
        Branches(template(), 2).plan()


def test_errors():
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        Branches(nn.Conv2d(2, 2, 1), 0)
    branches = cases.branches_of("basic")
    for mode in (True, False):
        branches.train(mode)
        with torch.set_grad_enabled(mode):
            for bad in (torch.tensor([[0, 5]]), torch.tensor([[0, -1]])):
                with pytest.raises(ValueError, match=r"routes\.index must name branches"):
                    branches(images(1), Routes(bad, torch.ones(1, 2)))
            with pytest.raises(ValueError, match=r"for 3 images|row for each of 3 images"):
                branches(images(3), cases.some_routes(2, B, K))


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    branches = cases.branches_of("reshaped").train(training)
    before = copy.deepcopy(branches.state_dict())
    with torch.set_grad_enabled(training):
        y = branches(images(0), cases.some_routes(0, B, K))
    assert y.shape == (0, K, 5)
    assert all(torch.equal(before[key], value) for key, value in branches.state_dict().items())


def test_same_branch_twice_and_all_branches():
    branches = cases.branches_of("basic").eval()
    index = torch.tensor([[2, 2, 2], [4, 0, 4]])
    routes, x = Routes(index, torch.ones(2, 3)), images(2)
    assert_close(
        branches(x, routes).detach(),
        cases.one_by_one(cases.copies_of(branches), x, routes).detach(),
        "twice",
    )


def test_synchronise_reaches_the_norms():
    branches = Branches(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), 2)
    synchronise_batch_norm(branches)
    norm = branches.stack.get_submodule("1")
    assert isinstance(norm, BranchBatchNorm2d)
    assert norm.synchronised


def test_deepcopy_and_pickle_run():
    branches = cases.branches_of("reshaped").eval()
    x, routes = images(), cases.some_routes(N, B, K)
    with torch.no_grad():
        expected = branches(x, routes)
        for twin in (copy.deepcopy(branches), pickle.loads(pickle.dumps(branches))):
            assert torch.equal(twin(x, routes), expected)
            twin.stack.fc.weight.zero_()
            assert not torch.equal(twin(x, routes), expected)
            assert list(twin.state_dict()) == list(branches.state_dict())
            twin.load_state_dict(branches.state_dict())
            assert torch.equal(twin(x, routes), expected)


def test_autocast():
    branches = cases.branches_of("basic", dtype=torch.float32).train()
    x, routes = images(dtype=torch.float32), cases.some_routes(N, B, K)
    expected = branches(x, routes)
    with torch.autocast("cpu", torch.bfloat16):
        y = branches(x, routes)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_compile_has_no_graph_break(training):
    branches = cases.branches_of("basic", dtype=torch.float32).train(training)
    x, routes = images(dtype=torch.float32), cases.some_routes(N, B, K)
    expected = copy.deepcopy(branches)(x, routes)
    compiled = torch.compile(branches, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, routes), expected, rtol=1e-4, atol=1e-4)


def test_layers_alone():
    conv = BranchConv2d(4, 6, 3, padding=1, branches=3)
    assert conv(torch.randn(2, 4, 5, 5), torch.tensor([[0, 1], [2, 0]])).shape == (2, 2, 6, 5, 5)
    with pytest.raises(ValueError, match="must divide by groups 3, got 4 and 6"):
        BranchConv2d(4, 6, 3, groups=3, branches=3)
    with pytest.raises(ValueError, match="must be positive, got 0, 4, 6 and 1"):
        BranchConv2d(4, 6, 3, branches=0)


def test_a_memory_format_for_the_whole_network():
    branches = cases.branches_of("basic").eval()
    x, routes = images(), cases.some_routes(N, B, K)
    with torch.no_grad():
        expected = branches(x, routes)
        moved = branches.to(memory_format=torch.channels_last)
        assert moved is branches
        weight = branches.stack.conv1.weight
        assert weight.is_contiguous()
        assert weight.dim() == 5
        assert_close(branches(x, routes), expected, "channels_last")
        # Back from another dtype, as .to() does both at once.
        half = branches.to(torch.float32, memory_format=torch.channels_last)
        assert half.stack.conv1.weight.dtype == torch.float32
