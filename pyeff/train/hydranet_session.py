"""One process's part of a HydraNet's training: its losses, its gate's statistics, a warning."""

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyeff.models.hydranet import HydraNet
from pyeff.train.batches import seed_of
from pyeff.train.evaluate import Accuracies, evaluate
from pyeff.train.gate_statistics import GateStatistics, GateSummary, statistics_of
from pyeff.train.hydranet_step import HydraStep
from pyeff.train.progress_bar import Bar
from pyeff.train.session import Batches, Session, TrainResult
from pyeff.train.state import kept
from pyeff.train.step import TrainStep

# A gate that was hardly trained yet sends most images to few branches, and soon stops.
FIRST_STEPS = 100


class CollapseWarning(UserWarning):
    """A HydraNet's gate sends most images to few branches."""


class HydraSession(Session):
    """A :class:`Session` that also follows the gate.

    Every epoch's record has the gate's statistics over the training images and, where the epoch
    was evaluated, over the test images.
    """

    statistics: GateStatistics
    step_module: HydraStep

    def make_step(self, network: nn.Module) -> TrainStep:
        """The losses of classes and of the gate."""
        config, model = self.config, cast(HydraNet, self.model)
        self.statistics = statistics_of(model)
        self.test: GateSummary | None = None
        self._collapsed = False
        return HydraStep(
            model,
            self.statistics,
            gate_loss_weight=config.gate_loss_weight,
            label_smoothing=config.label_smoothing,
            autocast=config.precision == "bf16",
            compile=config.compile,
        )

    def scale_gradients(self) -> None:
        """Means over the images that a branch got, if ``branch_mean`` asks for them.

        A loss is a mean over the batch, and an image's gradient is zero in the branches that it
        did not take: a branch's gradient is k / n_b of what its own images alone would give. With
        batch norm behind every convolution, that is a learning rate lower by as much.
        """
        if self.config.branch_mean == "batch":
            return
        model = cast(HydraNet, self.model)
        # The bias of the classes belongs to all images.
        owned = (*model.branches.parameters(), model.combiner.weight)
        gradients = [p.grad for p in owned if p.grad is not None]
        torch._foreach_mul_(gradients, model.n_b / model.k)

    def restore(self) -> None:
        """Takes up the run, this epoch's counts included."""
        super().restore()
        if self.processes.first:
            self.statistics.load(self.progress.counts)

    def save(self) -> None:
        """Writes the checkpoint with the counts of all processes, which the first one goes on."""
        self.statistics.gather(self.processes)
        self.progress.counts = dict(self.statistics.counts)
        super().save()
        if not self.processes.first:
            self.statistics.clear()

    def evaluate(self) -> Accuracies:
        """Test accuracy, and the gate's statistics beside it."""
        statistics = statistics_of(cast(HydraNet, self.model))
        accuracy = evaluate(self.model, self.tasks, processes=self.processes, statistics=statistics)
        self.test = statistics.summary()
        return accuracy

    def run(self) -> TrainResult:
        """Steps to the end, and what the gate does then."""
        result = super().run()
        if self.test is None:  # a finished run was taken up again
            self.evaluate()
        return replace(result, gate=self.test)

    def _update(self, batches: Batches, levels: list[int], step: int) -> Tensor:
        epoch = step // self.trainer.steps_per_epoch
        self.step_module.forced = epoch < self.config.teacher_forcing_epochs
        # The noisy gate's noise as a function of the step, as everything else that is drawn.
        torch.manual_seed(seed_of("gate", self.config.seed, step, self.processes.rank))
        try:
            return super()._update(batches, levels, step)
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise FloatingPointError(
                f"train: scores of the gate must be numbers, got NaN at step {step + 1} (epoch "
                f"{epoch + 1}); {kept(self.trainer.checkpoint)}; try a lower learning rate, "
                "warm-up or gradient clipping"
            ) from error

    def _end_epoch(self, bar: Bar) -> None:
        self.statistics.gather(self.processes)
        super()._end_epoch(bar)

    def _records(self, epoch: int, evaluated: bool) -> list[dict[str, Any]]:
        training = self.statistics.summary()
        self._warn(epoch, training.collapse())
        (record,) = super()._records(epoch, evaluated)
        record["gate"] = {"train": training.to_json(whole=False)}
        if evaluated and self.test is not None:
            record["gate"]["test"] = self.test.to_json(whole=False)
        self.statistics.clear()
        return [record]

    def _warn(self, epoch: int, trouble: str | None) -> None:
        """Says once when a gate begins to collapse, and again if it does so anew."""
        if self.progress.step < FIRST_STEPS:
            return
        if trouble and not self._collapsed and self.processes.first:
            warnings.warn(f"train: epoch {epoch}: {trouble}", CollapseWarning, stacklevel=2)
        self._collapsed = trouble is not None
