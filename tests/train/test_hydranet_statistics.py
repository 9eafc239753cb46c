import math

import pytest
import torch
from torch.nn import functional

from pyeff.train.batches import normalise
from pyeff.train.branch_plots import plot_branches, plot_use
from pyeff.train.evaluate import evaluate
from pyeff.train.gate_statistics import (
    GateStatistics,
    branches_ahead,
    statistics_of,
    use_entropy,
)
from pyeff.train.hydranet_step import HydraStep
from pyeff.train.network import build_network
from pyeff.train.tasks import load_tasks

# Six images of three classes on four branches, two branches each; worked out by hand below.
LABELS = torch.tensor([0, 0, 1, 1, 1, 2])
RIGHT = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
INDEX = torch.tensor([[0, 1], [1, 2], [1, 0], [1, 2], [0, 2], [2, 0]])
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])


def scores_of(index, branches):
    """Scores whose order begins with ``index``."""
    order = torch.arange(index.shape[1], 0, -1).float().expand(index.shape)
    return torch.zeros(len(index), branches).scatter_(1, index, order)


def logits_of(labels, right, classes):
    """Logits that are right where they shall be."""
    said = torch.where(right, labels, (labels + 1) % classes)
    return functional.one_hot(said, classes).float()


@pytest.fixture
def counted():
    statistics = GateStatistics(3, 4)
    logits, scores = logits_of(LABELS, RIGHT, 3), scores_of(INDEX, 4)
    # In two pieces: counts add up.
    for part in (slice(0, 4), slice(4, 6)):
        statistics.add(logits[part], scores[part], INDEX[part], LABELS[part], GROUPS[part])
    return statistics


def test_shares_equal_those_worked_out_by_hand(counted):
    summary = counted.summary()
    assert summary.images == 6
    assert summary.accuracy == pytest.approx(4 / 6)
    assert summary.top1 == pytest.approx(4 / 6)  # images 0, 2, 3, 5
    assert summary.topk == pytest.approx(4 / 6)  # images 1 and 4 run without their own branch
    assert summary.use == pytest.approx([4 / 12, 4 / 12, 4 / 12, 0])
    assert summary.entropy == pytest.approx(math.log(3) / math.log(4))
    assert list(summary.dead) == [3]
    assert summary.branch_accuracy == [
        pytest.approx(3 / 4),  # images 0, 2, 4, 5
        pytest.approx(3 / 4),  # images 0, 1, 2, 3
        pytest.approx(2 / 4),  # images 1, 3, 4, 5
        None,
    ]
    assert summary.class_accuracy == pytest.approx([1 / 2, 2 / 3, 1])
    expected = [[1 / 2, 1, 1 / 2, 0], [2 / 3, 2 / 3, 2 / 3, 0], [1, 0, 1, 0]]
    for row, shares in zip(summary.serves, expected, strict=True):
        assert row == pytest.approx(shares)


def test_topk_counts_what_lies_behind_the_first():
    statistics = GateStatistics(2, 3)
    index = torch.tensor([[0, 1], [2, 1], [2, 0]])
    labels = torch.tensor([1, 1, 1])
    statistics.add(torch.zeros(3, 2), scores_of(index, 3), index, labels, labels)
    summary = statistics.summary()
    assert summary.top1 == 0
    assert summary.topk == pytest.approx(2 / 3)
    assert list(summary.class_accuracy) == [None, 0]


def test_equal_scores_go_to_the_lower_branch():
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert branches_ahead(scores, torch.tensor([1, 1])).tolist() == [1, 0]
    assert branches_ahead(scores, torch.tensor([0, 2])).tolist() == [0, 1]


def test_a_gate_without_labels_has_no_accuracy():
    statistics = GateStatistics(3, 4)
    logits, scores = logits_of(LABELS, RIGHT, 3), scores_of(INDEX, 4)
    statistics.add(logits, scores, INDEX, LABELS, None)
    summary = statistics.summary()
    assert summary.top1 is None
    assert summary.topk is None
    assert summary.accuracy == pytest.approx(4 / 6)


def test_entropy_of_use():
    assert use_entropy(torch.full((8,), 1 / 8)) == pytest.approx(1)
    assert use_entropy(torch.tensor([1.0, 0, 0])) == 0
    assert use_entropy(torch.tensor([1.0])) == 1


def test_collapse_is_told_and_even_use_is_not(counted):
    assert "1 of 4 branches get less than 5% of even use (3)" in counted.summary().collapse()
    even, single = GateStatistics(2, 4), GateStatistics(2, 4)
    index = torch.arange(4).unsqueeze(1)
    labels = torch.tensor([0, 0, 1, 1])
    even.add(torch.zeros(4, 2), torch.zeros(4, 4), index, labels, None)
    assert even.summary().collapse() is None
    single.add(torch.zeros(4, 2), torch.zeros(4, 4), torch.zeros_like(index), labels, None)
    assert "entropy of its use is 0.00 of log n_b, below 0.75" in single.summary().collapse()
    assert "3 of 4 branches" in single.summary().collapse()


def test_counts_survive_a_checkpoint_and_a_new_epoch(counted):
    again = GateStatistics(3, 4)
    again.load(counted.counts)
    assert again.summary() == counted.summary()
    again.clear()
    assert again.summary().images == 0
    assert counted.summary().images == 6


def network(**changes):
    model = {"family": "hydranet_resnet", "n_b": 5, "k": 2, "widths": [4, 8, 8], **changes}
    tasks = load_tasks(("digits",), limit_train=64, limit_test=48)
    torch.manual_seed(0)
    return build_network(model, tasks), tasks


def test_evaluation_counts_what_the_network_does():
    model, tasks = network(k=3)
    statistics = statistics_of(model)
    accuracy = evaluate(model, tasks, batch_size=20, statistics=statistics)
    summary = statistics.summary()
    assert summary.accuracy == pytest.approx(accuracy["digits", 1], abs=1e-6)
    assert accuracy == evaluate(model, tasks)
    (task,) = tasks
    x = normalise(task.test_images, task.mean, task.std)
    with torch.no_grad():
        output = model.eval().forward_with_gate(x)
    owner = model.class_group[task.test_labels]
    chosen = output.routes.index
    assert summary.topk == pytest.approx(
        float((chosen == owner.unsqueeze(1)).any(1).double().mean())
    )
    assert summary.top1 == pytest.approx(float((chosen[:, 0] == owner).double().mean()))
    used = torch.bincount(chosen.flatten(), minlength=5) / chosen.numel()
    assert summary.use == pytest.approx(used.tolist())


def test_statistics_are_refused_for_a_network_without_a_gate():
    model, tasks = network()
    plain = build_network({"family": "backbone", "backbone": "resnet8"}, tasks)
    with pytest.raises(ValueError, match="model must be a HydraNet to have statistics, got ResNet"):
        evaluate(plain, tasks, statistics=statistics_of(model))


def batch(task, count=32):
    images, labels = task.train_images[:count], task.train_labels[:count]
    return normalise(images, task.mean, task.std), labels


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_is_that_of_classes_and_of_the_gate(weight):
    model, (task,) = network()
    x, y = batch(task)
    step = HydraStep(model, statistics_of(model), gate_loss_weight=weight, label_smoothing=0.1)
    value, teacher = step.loss(x, y, task.name, 1, None)
    output = model.forward_with_gate(x)
    expected = functional.cross_entropy(output.logits, y, label_smoothing=0.1)
    gate = functional.cross_entropy(output.scores, model.class_group[y])
    torch.testing.assert_close(value, expected + weight * gate)
    assert teacher is None


def test_a_supervised_gate_learns_from_its_own_loss_alone():
    model, (task,) = network()
    x, y = batch(task)
    score = model.gate.top_k.score.weight
    without = HydraStep(model, statistics_of(model), gate_loss_weight=0.0)
    without.loss(x, y, task.name, 1, None)[0].backward()
    assert torch.equal(score.grad, torch.zeros_like(score))
    score.grad = None
    HydraStep(model, statistics_of(model)).loss(x, y, task.name, 1, None)[0].backward()
    assert bool(score.grad.any())


def test_a_noisy_gate_has_its_balance_losses():
    model, (task,) = network(gate="noisy_topk")
    x, y = batch(task)
    step = HydraStep(model.train(), statistics_of(model))
    torch.manual_seed(3)
    value, _ = step.loss(x, y, task.name, 1, None)
    torch.manual_seed(3)
    output = model.forward_with_gate(x)
    assert output.auxiliary.item() > 0
    torch.testing.assert_close(value, functional.cross_entropy(output.logits, y) + output.auxiliary)
    assert step.statistics.summary().top1 is None


def test_teacher_forcing_lets_the_right_branch_run():
    model, (task,) = network(k=1)
    x, y = batch(task)
    forced, free = (HydraStep(model, statistics_of(model)) for _ in range(2))
    forced.forced = True
    for step in (forced, free):
        step.loss(x, y, task.name, 1, None)
    serves = torch.tensor(forced.statistics.summary().serves)
    owned = functional.one_hot(model.class_group, 5)
    seen = torch.bincount(y, minlength=10) > 0
    assert torch.equal(serves[seen], owned[seen].float())
    assert not torch.equal(torch.tensor(free.statistics.summary().serves)[seen], serves[seen])
    # What the gate would have chosen is judged, not what it was made to choose.
    assert forced.statistics.summary().top1 == free.statistics.summary().top1


def test_pictures(counted, tmp_path):
    gate = counted.summary().to_json()
    plot_use(gate, tmp_path / "use.png")
    plot_branches(gate, ["a", "b", "c"], tmp_path / "owned.png", class_groups=[0, 1, 2])
    plot_branches(gate, ["a", "b", "c"], tmp_path / "free.png")
    for name in ("use", "owned", "free"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
