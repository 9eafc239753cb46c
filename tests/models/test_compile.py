"""torch.compile and torch.export of nested networks: one graph for many levels."""

import pytest
import torch
from models.model_cases import randomise_norms
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pyeff.models import dvn


def _model(mode="full", levels=5, stages=2):
    widths = [10, 20] if levels == 5 else [8, 16]
    sizes = {"widths": widths[:stages], "depths": [1] * stages}
    return randomise_norms(dvn("resnet8", {"a": 4, "b": 3}, levels, mode, in_channels=1, **sizes))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["full", "inner", "grouped"])
def test_levels_share_graphs(mode):
    model = _model(mode).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for level in (1, 2, 3, 4, 5, 2, 1):
            torch.testing.assert_close(compiled(x, "b", level), model(x, "b", level))
    assert counter.frame_count <= 3


def test_training_shares_graphs_and_gradients():
    model, twin = _model(levels=4, stages=1), _model(levels=4, stages=1)
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 1, 8, 8)
    for level in (1, 2, 3, 4):
        for run in (compiled, twin):
            run(x, "b", level).square().sum().backward()
    assert counter.frame_count <= 3
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class _OneTask(nn.Module):
    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x, level):
        return self.model(x, self.task, level)


@pytest.mark.parametrize(("mode", "task"), [("full", "b"), ("inner", "b"), ("grouped", "a")])
def test_export_keeps_the_level_as_an_input(mode, task):
    model = _model(mode, levels=4).eval()
    x = torch.randn(2, 1, 8, 8)
    program = torch.export.export(_OneTask(model, task), (x, torch.tensor(2))).module()
    for level in (1, 2, 3, 4):
        torch.testing.assert_close(program(x, torch.tensor(level)), model(x, task, level))
