import pytest
import torch
from torch.nn import functional
from train.tiny import MODEL

from pyeff.models import build
from pyeff.train.optimizer import (
    build_optimizer,
    decayed_names,
    load_optimizer_tensors,
    optimizer_tensors,
)
from pyeff.train.step import TrainStep, levels_of_step, soft_cross_entropy

TASKS = {"class": 10, "parity": 2}


def network():
    torch.manual_seed(0)
    return build({**MODEL, "tasks": TASKS, "in_channels": 1}).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    return {
        task: (
            torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (6,), generator=generator),
        )
        for task, classes in TASKS.items()
    }


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_sum_trains_every_level_largest_first():
    assert levels_of_step(5, "sum") == [5, 4, 3, 2, 1]
    assert levels_of_step(3, "sandwich", count=4) == [3, 2, 1]


def test_sandwich_keeps_both_ends_and_draws_the_rest():
    drawn = [levels_of_step(9, "sandwich", count=4, seed=5, step=s) for s in range(200)]
    assert all(d[0] == 9 and d[-1] == 1 and len(set(d)) == 4 for d in drawn)
    assert all(d == sorted(d, reverse=True) for d in drawn)
    assert {level for d in drawn for level in d} == set(range(1, 10))
    assert drawn == [levels_of_step(9, "sandwich", count=4, seed=5, step=s) for s in range(200)]
    assert drawn != [levels_of_step(9, "sandwich", count=4, seed=6, step=s) for s in range(200)]


def test_soft_cross_entropy():
    logits = torch.randn(4, 3, dtype=torch.float64)
    target = torch.randn(4, 3, dtype=torch.float64).softmax(1)
    expected = functional.cross_entropy(logits, target)
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)


@pytest.mark.parametrize("distill", [False, True])
def test_accumulate_is_the_gradient_of_the_sum(distill):
    model = network()
    step = TrainStep(model, distill=distill)
    losses = step.accumulate(batches(), [2, 1])
    one_by_one = gradients(model)
    model = network()
    together = TrainStep(model, distill=distill)(batches(), [2, 1])
    together.sum().backward()
    torch.testing.assert_close(losses, together.detach())
    assert one_by_one.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(one_by_one[name], gradient)


def test_losses_are_those_of_the_labels():
    model = network()
    losses = TrainStep(model, label_smoothing=0.1)(batches(), [2, 1])
    for row, (task, (x, y)) in enumerate(batches().items()):
        for column, level in enumerate((2, 1)):
            logits = network()(x, task=task, level=level)
            expected = functional.cross_entropy(logits, y, label_smoothing=0.1)
            torch.testing.assert_close(losses[row, column], expected)


def test_distillation_follows_the_largest_level_and_does_not_move_it():
    model = network()
    (x, y) = batches()["class"]
    losses = TrainStep(model, distill=True)({"class": (x, y)}, [2, 1])
    soft = network()(x, task="class", level=2).softmax(1)
    small = network()(x, task="class", level=1).log_softmax(1)
    torch.testing.assert_close(losses[0, 1], -(soft * small).sum(1).mean())
    losses[0, 1].backward()
    # Units of level 2 alone take part only in the teacher, which gets no gradient.
    outside = model.stems[0].conv.weight.grad[2:]
    assert torch.equal(outside, torch.zeros_like(outside))


def test_weight_decay_is_for_weights_of_convolutions_and_linears():
    model = network()
    names = decayed_names(model)
    assert {n for n in names if "norm" in n or n.endswith("bias")} == set()
    assert all(model.get_parameter(n).dim() in (2, 4) for n in names)
    optimizer = build_optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.5)
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    assert sizes == [len(names), len(list(model.parameters())) - len(names)]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]


def test_optimizer_raises_the_version_of_weights():
    # Packed copies of a weight are found out of date by its version; see build_optimizer.
    model = network()
    optimizer = build_optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.0)
    before = {n: p._version for n, p in model.named_parameters()}
    TrainStep(model).accumulate(batches(), [2, 1])
    optimizer.step()
    assert all(p._version > before[n] for n, p in model.named_parameters())


def test_optimizer_state_by_name():
    model, other = network(), network()
    optimizers = [
        build_optimizer(m, lr=0.1, momentum=0.9, weight_decay=0.1) for m in (model, other)
    ]
    for _ in range(2):
        optimizers[0].zero_grad()
        TrainStep(model).accumulate(batches(), [2, 1])
        optimizers[0].step()
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(other, optimizers[1], optimizer_tensors(model, optimizers[0]))
    for net, optimizer in zip((model, other), optimizers, strict=True):
        optimizer.zero_grad()
        TrainStep(net).accumulate(batches(), [2, 1])
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="must belong to a parameter"):
        load_optimizer_tensors(model, optimizers[0], {"optimizer.momentum.ghost": torch.ones(1)})
