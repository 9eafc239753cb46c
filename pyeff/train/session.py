"""One process's part of a training run: network, optimiser, and the loop over the steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyeff.checkpoint import load_model_tensors, read_archive
from pyeff.models import NestedNet
from pyeff.nn import synchronise_batch_norm
from pyeff.train.batches import BatchStream, normalise
from pyeff.train.calibrate import calibrate
from pyeff.train.evaluate import Accuracies, evaluate
from pyeff.train.gate_statistics import GateSummary
from pyeff.train.history import History
from pyeff.train.interrupt import StopRequest, TrainingInterrupted
from pyeff.train.network import build_network, lay_out, levels_of
from pyeff.train.optimizer import add_product_decay, build_optimizer
from pyeff.train.processes import Processes
from pyeff.train.progress_bar import Bar, progress_bar
from pyeff.train.schedule import learning_rate
from pyeff.train.state import Progress, kept, load_state, save_state
from pyeff.train.step import TrainStep, levels_of_step
from pyeff.train.tasks import TaskData

if TYPE_CHECKING:
    from pyeff.train.trainer import Trainer

_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
_MASK_UPDATES = 64
Batches = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.fit` returns.

    Attributes:
        model: the trained network, in eval mode, on the training device.
        accuracy: ``(task name, level)`` to the share of right answers on the test images, with the
            mean over the classes beside it.
        records: every line of ``metrics.jsonl``.
        seconds: spent in training, over all sessions.
        gate: of a HydraNet, what its gate did with the test images.
        compressed: of a run with ``compress``, what the reload left: see
            :meth:`pyeff.compress.Compressed.to_json`.
    """

    model: nn.Module
    accuracy: Accuracies
    records: list[dict[str, Any]]
    seconds: float
    gate: GateSummary | None = None
    compressed: dict[str, Any] | None = None


class Session:
    """One process's part of a run: network, optimiser and where it stands."""

    def __init__(self, trainer: "Trainer", processes: Processes) -> None:
        config, self.trainer, self.processes = trainer.config, trainer, processes
        self.config, self.tasks, self.device = config, trainer.tasks, processes.device
        # One seed for every process: they must start from the same weights.
        torch.manual_seed(config.seed)
        self.dtype = _DTYPES[config.precision]
        self.take(build_network(config.model, self.tasks))
        self.levels = levels_of(self.model)
        self.streams = {
            task.name: BatchStream(
                task,
                config.batch_size,
                config.seed,
                augmented=config.augment,
                rank=processes.rank,
                ranks=processes.ranks,
            )
            for task in self.tasks
        }
        self.progress = Progress.start(len(self.tasks), self.levels)
        first = processes.first
        self.history = History(trainer.out / "metrics.jsonl" if first else None)
        self.accuracy = Accuracies()

    def take(self, model: nn.Module) -> None:
        """Makes a network the one that is trained, with a fresh optimiser.

        Args:
            model: moved to the run's device, precision and memory format.
        """
        config = self.config
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device, self.dtype)
        lay_out(self.model, layout)
        self.optimizer = build_optimizer(
            self.model,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            factors=config.weight_decay_on == "factors",
        )
        self.step_module, self.wrapped = self._wrap()

    def _wrap(self) -> tuple[TrainStep, nn.Module | None]:
        config = self.config
        distributed = self.processes.ranks > 1
        if distributed and config.sync_batch_norm:
            synchronise_batch_norm(self.model)
        network: nn.Module = self.model
        if config.compile:
            network = cast(nn.Module, torch.compile(self.model))
        step = self.make_step(network)
        if not distributed:
            return step, None
        # Tasks in turn and sampled levels leave parameters without a gradient in some steps.
        some_unused = config.task_rule == "alternate" or config.level_rule == "sandwich"
        return step, DistributedDataParallel(step, find_unused_parameters=some_unused)

    def make_step(self, network: nn.Module) -> TrainStep:
        """The losses of a step, of the network or of its compiled form."""
        return TrainStep(
            network,
            distill=self.config.distill,
            label_smoothing=self.config.label_smoothing,
            autocast=self.config.precision == "bf16",
        )

    def evaluate(self) -> Accuracies:
        """Test accuracy of every (task, level)."""
        return evaluate(self.model, self.tasks, processes=self.processes)

    def begin(self) -> None:
        """Starts the run, with the weights of another one if it is told so."""
        self.history.restart([])
        where = self.config.init_from
        if where is None:
            return
        tensors, _ = read_archive(where)
        found = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        load_model_tensors(self.model, found, where)

    def restore(self) -> None:
        """Takes up the run where its checkpoint stands."""
        path = self.trainer.checkpoint
        self.progress, meta = load_state(path, self.model, self.optimizer, self.config.deciding())
        self.history.restart(meta["records"])
        self.accuracy = Accuracies()
        for known in meta["accuracy"]:
            key = (known["task"], known["level"])
            self.accuracy[key] = known["accuracy"]
            # Older checkpoints have none.
            if known.get("class_mean") is not None:
                self.accuracy.class_mean[key] = known["class_mean"]

    def save(self) -> None:
        """Writes the checkpoint: the first process does, for all."""
        self.processes.copy_buffers(self.model)
        self.processes.by_first(
            lambda: save_state(
                self.trainer.checkpoint, self.model, self.optimizer, self.progress, self._meta()
            )
        )

    def _meta(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "tasks": {task.name: task.describe() for task in self.tasks},
            "records": self.history.records,
            "accuracy": [
                {
                    "task": task,
                    "level": level,
                    "accuracy": value,
                    "class_mean": self.accuracy.class_mean.get((task, level)),
                }
                for (task, level), value in self.accuracy.items()
            ],
        }

    def run(self) -> TrainResult:
        """Steps to the end, then calibration and the last evaluation."""
        try:
            self._train()
        finally:
            self.wrapped = None  # see processes.joined
        if self.config.calibrate:
            self.calibrate(self.config.calibrate)
            self.accuracy = self.evaluate()
        self.model.eval()
        return TrainResult(self.model, self.accuracy, self.history.records, self.progress.seconds)

    def _train(self) -> None:
        """Steps to the end, or to a request to stop."""
        shown = self.config.progress and self.processes.first
        done = self.progress.step
        with StopRequest() as stop, progress_bar(self.trainer.steps, done, shown) as bar:
            self.model.train()
            while self.progress.step < self.trainer.steps:
                stopped = self._one_step(stop, bar)
                if self.progress.step % self.trainer.steps_per_epoch == 0:
                    self._end_epoch(bar)
                if stopped:
                    self.save()
                    raise TrainingInterrupted(
                        f"stopped after step {self.progress.step} of {self.trainer.steps}; the "
                        f"state is in {self.trainer.checkpoint}"
                    )

    def _one_step(self, stop: StopRequest, bar: Bar) -> bool:
        """Trains one step; returns whether any process was asked to stop."""
        began, step = time.perf_counter(), self.progress.step
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        levels = levels_of_step(
            self.levels,
            self.config.level_rule,
            count=self.config.sandwich_levels,
            seed=self.config.seed,
            step=step,
        )
        self._thin_masks(step)
        batches = {name: self._batch(stream, step) for name, stream in self.streams.items()}
        if self.config.task_rule == "joint":
            losses = self._update(batches, levels, step)
        else:
            rows = [self._update({n: batch}, levels, step) for n, batch in batches.items()]
            losses = torch.cat(rows)
        stopped = self.processes.any(stop.raised)
        columns = torch.tensor(levels) - 1
        self.progress.loss_sum[:, columns] += losses.double().cpu()
        self.progress.loss_count[:, columns] += 1
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - began
        bar.advance(f"epoch {step // self.trainer.steps_per_epoch + 1}  loss {losses.mean():.3f}")
        return stopped

    def _thin_masks(self, step: int) -> None:
        """Moves NestedNet's masks along; sorting every weight at every step would cost too much."""
        if not isinstance(self.model, NestedNet):
            return
        last = max(1, round(self.config.prune_until * self.trainer.steps))
        if step <= last and (step == last or step % max(1, last // _MASK_UPDATES) == 0):
            self.model.step(step / last)

    def _batch(self, stream: BatchStream, step: int) -> tuple[Tensor, Tensor]:
        x, y = stream.batch(step)
        return x.to(self.device, self.dtype), y.to(self.device)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            self.trainer.steps,
            peak=self.config.lr,
            schedule=self.config.schedule,
            warmup=self.config.warmup,
        )

    def _update(self, batches: Batches, levels: list[int], step: int) -> Tensor:
        """Gradients of all given tasks and levels, and one optimiser step.

        Returns:
            The losses over all processes, detached: ``[tasks, levels]``.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.wrapped is None:
            losses = self.step_module.accumulate(batches, levels)
        else:
            connected = self.wrapped(batches, levels)
            connected.sum().backward()
            losses = self.processes.mean(connected.detach())
        self._check_finite(losses, list(batches), levels, step)
        self.scale_gradients()
        if self.config.weight_decay_on == "product":
            add_product_decay(self.model, self.config.weight_decay)
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return losses

    def scale_gradients(self) -> None:
        """What a kind of network does to its gradients before they are clipped and used."""

    def _check_finite(self, losses: Tensor, names: list[str], levels: list[int], step: int) -> None:
        finite = torch.isfinite(losses)
        if bool(finite.all()):
            return
        row, column = (~finite).nonzero()[0].tolist()
        raise FloatingPointError(
            f"train: losses must be finite, got {losses[row, column].item()} at step {step + 1} "
            f"(epoch {step // self.trainer.steps_per_epoch + 1}) for task {names[row]!r}, level "
            f"{levels[column]}; {kept(self.trainer.checkpoint)}; try a lower learning rate, "
            "warm-up or gradient clipping"
        )

    def _end_epoch(self, bar: Bar) -> None:
        epoch = self.progress.step // self.trainer.steps_per_epoch
        last = epoch == self.config.epochs
        evaluated = last or epoch % self.config.eval_every == 0
        if evaluated:
            self.processes.copy_buffers(self.model)
            self.accuracy = self.evaluate()
        records = self._records(epoch, evaluated)
        self.history.add(records)
        bar.say(_epoch_line(epoch, records))
        fresh = Progress.start(len(self.tasks), self.levels)
        self.progress.loss_sum, self.progress.loss_count = fresh.loss_sum, fresh.loss_count
        if last or epoch % self.config.save_every == 0:
            self.save()

    def _records(self, epoch: int, evaluated: bool) -> list[dict[str, Any]]:
        means = self.progress.loss_sum / self.progress.loss_count.clamp_min(1)
        return [
            {
                "epoch": epoch,
                "step": self.progress.step,
                "task": task.name,
                "level": level,
                "train_loss": float(means[row, level - 1]),
                "test_accuracy": self.accuracy[task.name, level] if evaluated else None,
                "test_class_mean": (
                    self.accuracy.class_mean[task.name, level] if evaluated else None
                ),
                "lr": self._learning_rate(self.progress.step - 1),
                "seconds": round(self.progress.seconds, 3),
            }
            for row, task in enumerate(self.tasks)
            for level in range(1, self.levels + 1)
        ]

    def calibrate(self, count: int) -> None:
        """Statistics of batch norms from the first images of each task, without augmentation.

        Args:
            count: batches of each task.
        """
        size = self.config.batch_size

        def images(task: TaskData) -> list[Tensor]:
            pieces = task.train_images[: size * count].split(size)
            return [
                normalise(piece, task.mean, task.std).to(self.device, self.dtype)
                for piece in pieces
            ]

        batches: Mapping[str, list[Tensor]] = {task.name: images(task) for task in self.tasks}
        calibrate(self.model, batches)


def _epoch_line(epoch: int, records: list[dict[str, Any]]) -> str:
    words = [f"epoch {epoch:3d}"]
    for task in dict.fromkeys(r["task"] for r in records):
        mine = [r for r in records if r["task"] == task]
        shown = [
            f"{r['test_accuracy']:.1%}" if r["test_accuracy"] is not None else "-" for r in mine
        ]
        words.append(f"{task}: {' '.join(shown)}")
    return "   ".join(words)
