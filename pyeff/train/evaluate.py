"""Accuracy of every (task, level), and the table of it beside the costs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.models.hydranet import HydraNet
from pyeff.train.batches import normalise
from pyeff.train.gate_statistics import GateStatistics
from pyeff.train.network import call, is_supervised, levels_of
from pyeff.train.processes import Processes
from pyeff.train.tasks import TaskData


@dataclass(frozen=True)
class LevelResult:
    """One line of the table: what a level costs and what it gives.

    Attributes:
        task: name.
        level: from 1.
        accuracy: share of test images, 0..1; ``None`` where no data was given.
        params: parameters in use.
        macs: multiply-adds an image.
        weight_bytes: bytes of those parameters.
        peak_bytes: largest sum of activations alive at once, an image.
        latency_s: seconds an image, measured; ``None`` if not measured.
        gate: of a HydraNet, what its gate did with the test images, as
            :meth:`pyeff.train.gate_statistics.GateSummary.to_json` gives it.
        class_mean: mean over the classes of the share of right answers, 0..1: what the accuracy
            would be if all classes had as many test images.
    """

    task: str
    level: int
    accuracy: float | None
    params: int
    macs: int
    weight_bytes: int
    peak_bytes: int
    latency_s: float | None = None
    gate: dict[str, Any] | None = None
    class_mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Accuracies(dict[tuple[str, int], float]):
    """``(task name, level)`` to the share of right answers, 0..1.

    Attributes:
        class_mean: by the same keys the mean over the classes of each class's share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.class_mean: dict[tuple[str, int], float] = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient, then the mode from before."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def evaluate(
    model: nn.Module,
    tasks: Sequence[TaskData],
    *,
    processes: Processes | None = None,
    batch_size: int = 500,
    statistics: GateStatistics | None = None,
) -> Accuracies:
    """Test accuracy of every (task, level), in the precision of the weights.

    Args:
        model: nested, or plain.
        tasks: the test images.
        processes: who shares the work; each takes every so manieth image and the counts are
            summed. ``None`` is this process alone, on the model's device.
        batch_size: images a call.
        statistics: for a HydraNet: filled with what the gate did, summed over the processes.

    Returns:
        ``(task name, level)`` to the share of right answers, 0..1, and the mean over the classes
        that have test images; alike in every process.
    """
    like = next(model.parameters())
    rank, ranks = (processes.rank, processes.ranks) if processes else (0, 1)
    results, levels = Accuracies(), levels_of(model)
    with evaluating(model):
        for task in tasks:
            # Images of each class: right at each level, and all.
            right = torch.zeros(levels, task.classes, dtype=torch.int64, device=like.device)
            every = right.new_zeros(task.classes)
            for x, y in _test_batches(task, batch_size, rank, ranks, like):
                every += y.bincount(minlength=task.classes)
                for level in range(1, levels + 1):
                    if statistics is not None:
                        logits = _observed(model, x, y, statistics)
                    else:
                        logits = call(model, x, task.name, level)
                    hit = logits.argmax(1) == y
                    right[level - 1] += y[hit].bincount(minlength=task.classes)
            if processes is not None:
                right, every = processes.sum(right), processes.sum(every)
            _note(results, task.name, right.double(), every.double())
    if statistics is not None and processes is not None:
        statistics.gather(processes)
    return results


def _note(results: Accuracies, task: str, right: Tensor, every: Tensor) -> None:
    """Writes a task's counts down as shares; those of classes without test images are left out."""
    present = every > 0
    for level, of_level in enumerate(right, start=1):
        results[task, level] = float(of_level.sum() / every.sum())
        results.class_mean[task, level] = float((of_level[present] / every[present]).mean())


def _observed(model: nn.Module, x: Tensor, y: Tensor, statistics: GateStatistics) -> Tensor:
    """Logits of a HydraNet, with its gate's choices counted."""
    if not isinstance(model, HydraNet):
        raise ValueError(
            f"evaluate: model must be a HydraNet to have statistics, got {type(model).__name__}"
        )
    output = model.forward_with_gate(x)
    groups = model.class_group[y] if is_supervised(model) else None
    statistics.add(output.logits, output.scores, output.routes.index, y, groups)
    return output.logits


def _test_batches(
    task: TaskData, batch_size: int, rank: int, ranks: int, like: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = task.test_images[rank::ranks], task.test_labels[rank::ranks]
    for begin in range(0, len(labels), batch_size):
        piece = images[begin : begin + batch_size].to(like.device)
        x = normalise(piece, task.mean, task.std).to(like.dtype)
        yield x, labels[begin : begin + batch_size].to(like.device)
