"""torch.compile and torch.export of whole HydraNets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pyeff.models import hydranet_densenet, hydranet_resnet, hydranet_resnet50, hydranet_ressep
from pyeff.nn import BranchBatchNorm2d

TINY = {"n_b": 3, "k": 2, "d": 1}
MODELS = {
    "resnet": lambda **kw: hydranet_resnet(6, widths=(4, 6, 8), **TINY, **kw),
    "resnet preactivation": lambda **kw: hydranet_resnet(
        6, widths=(4, 6, 8), preactivation=True, **TINY, **kw
    ),
    "densenet": lambda **kw: hydranet_densenet(6, growth=4, **TINY, **kw),
    "ressep": lambda **kw: hydranet_ressep(6, w_s=0.0625, w_b=0.01, w_g=0.01, **TINY, **kw),
    "resnet50": lambda **kw: hydranet_resnet50(
        6, w_s=0.0625, w_b=0.004, w_g=0.004, depths=(1, 1, 1), **TINY, **kw
    ),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randomised(model):
    """Statistics that a mistake would show in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | BranchBatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images(n=3, size=16):
    return torch.randn(n, 3, size, size)


def assert_same(actual, expected, **options):
    options = {"rtol": 1e-4, "atol": 1e-4, **options}
    torch.testing.assert_close(actual, expected, check_stride=False, **options)


class Step(nn.Module):
    """The losses of a training step, as one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels, forced):
        groups = self.model.class_group[labels]
        out = self.model.forward_with_gate(x, groups if forced else None)
        loss = F.cross_entropy(out.logits, labels) + F.cross_entropy(out.scores, groups)
        return loss + out.auxiliary, out.routes.index


def assert_same_step(model, compiled, twin, x, labels, forced=False):
    """One SGD step of both: the loss, the routes, every gradient, parameter and buffer."""
    results = []
    for run, owner in ((compiled, model), (Step(twin), twin)):
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
        loss, index = run(x, labels, forced)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append((loss, index))
    (ours, our_index), (theirs, their_index) = results
    assert torch.equal(our_index, their_index)
    assert_same(ours, theirs)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert_same(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in model.state_dict().items():
        assert_same(value, twin.state_dict()[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_compiles_as_one_graph(name):
    model, x = randomised(MODELS[name]()), images(size=32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
    assert counter.frame_count == 1


def test_k_and_the_batch_change_at_run_time():
    model = randomised(MODELS["resnet"]())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (3, 5, 7, 2):
            x = images(n)
            assert_same(compiled(x), model(x))
        assert counter.frame_count <= 2, "the second batch size makes the graph one for all"
        for k in (1, 3):
            assert_same(compiled(x, k=k), model(x, k=k))


def test_a_training_step_compiles():
    model = MODELS["resnet"]()
    twin = copy.deepcopy(model)
    compiled = torch.compile(Step(model), fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, 3, 5, 1])
    assert_same_step(model, compiled, twin, images(4), labels)
    assert_same_step(model, compiled, twin, images(4), labels, forced=True)


@pytest.mark.parametrize("name", MODELS)
def test_exports(name):
    model, x = randomised(MODELS[name]()), images(size=32)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert_same(program.module()(x), model(x))


def test_exports_for_any_number_of_images_and_any_size():
    model = randomised(MODELS["resnet"]())
    sizes = {0: torch.export.Dim("n"), 2: 4 * torch.export.Dim("h"), 3: 4 * torch.export.Dim("w")}
    program = torch.export.export(model, (images(3, 16),), dynamic_shapes=(sizes,))
    run = program.module()
    with torch.no_grad():
        for x in (images(3, 16), images(1, 24), torch.randn(5, 3, 12, 20)):
            assert_same(run(x), model(x))
