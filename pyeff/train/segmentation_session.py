"""One process's part of a run for segmentation: the two stages and the loop over the steps."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyeff import models
from pyeff.checkpoint import (
    FILE_NAME,
    load,
    load_model_tensors,
    read_archive,
    save,
)
from pyeff.models.erfnet import STRIDE
from pyeff.nn import synchronise_batch_norm
from pyeff.train.batches import seed_of
from pyeff.train.history import History
from pyeff.train.interrupt import StopRequest, TrainingInterrupted
from pyeff.train.network import lay_out
from pyeff.train.processes import Processes
from pyeff.train.progress_bar import Bar, progress_bar
from pyeff.train.schedule import poly_learning_rate
from pyeff.train.segmentation_augment import SegmentationBatches, has_torchvision
from pyeff.train.segmentation_config import SegmentationConfig
from pyeff.train.segmentation_data import SegmentationData
from pyeff.train.segmentation_loss import (
    ENCODER_OFFSET,
    FULL_OFFSET,
    class_counts,
    class_weights,
    pixel_loss,
    targets_for,
)
from pyeff.train.segmentation_metrics import SegmentationScore, evaluate_segmentation
from pyeff.train.segmentation_state import (
    BEST_FILE_NAME,
    FILE_NAMES,
    SegmentationProgress,
    check_same_data,
    check_same_run,
    read_segmentation_state,
    restore_tensors,
    save_segmentation_state,
)
from pyeff.train.state import kept

_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
ENCODER, WHOLE = 1, 2


class SegmentationSession:
    """One process's part of a run: the network of its stage, its optimiser and where it stands.

    Args:
        config: the run.
        data: its data.
        processes: who this process is.

    Attributes:
        model: of the stage that the run is in.
        left_fresh: parameters that ``init_from`` had none for.
    """

    def __init__(
        self, config: SegmentationConfig, data: SegmentationData, processes: Processes
    ) -> None:
        self.config, self.data, self.processes = config, data, processes
        self.out = Path(config.out)
        self.checkpoint, self.best = self.out / FILE_NAME, self.out / BEST_FILE_NAME
        self.dtype = _DTYPES[config.precision]
        self.batches = SegmentationBatches(
            data.split("train"),
            config.batch_size,
            config.seed,
            augmented=config.augment,
            rank=processes.rank,
            ranks=processes.ranks,
        )
        self.steps_per_epoch = -(-len(data.split("train")) // config.batch_size)
        self.stage1_steps = self.steps_per_epoch * config.stage1_epochs
        self.steps = self.stage1_steps + self.steps_per_epoch * config.epochs
        self.history = History(self.out / "metrics.jsonl" if processes.first else None)
        self.left_fresh: list[str] = []
        self._enter(ENCODER if config.stage1_epochs else WHOLE)
        self.progress = SegmentationProgress(self.stage)

    def _enter(self, stage: int) -> None:
        """Makes the network of a stage, its optimiser and its class weights."""
        config, self.stage = self.config, stage
        # One seed for every process: they must start from the same weights.
        torch.manual_seed(seed_of("weights", config.seed, stage))
        self.model = models.build(
            {**config.model, "classes": self.data.classes, "encoder_only": stage == ENCODER}
        )
        self.model.to(self.processes.device, self.dtype)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        lay_out(self.model, layout)
        distributed = self.processes.ranks > 1
        if distributed and config.sync_batch_norm:
            synchronise_batch_norm(self.model)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            # Not fused: that one does not raise a tensor's version, by which packed copies of
            # weights are found to be out of date.
            foreach=True,
        )
        self.weights = self._class_weights().to(self.processes.device)
        self.network: nn.Module = self.model
        if config.compile:
            self.network = cast(nn.Module, torch.compile(self.model))
        if distributed:
            self.network = DistributedDataParallel(self.network)

    def _class_weights(self) -> Tensor:
        if not self.config.weighted:
            return torch.ones(self.data.classes)
        counts = class_counts(self.data.split("train").labels, self.data.classes, self._stride)
        return class_weights(counts, ENCODER_OFFSET if self.stage == ENCODER else FULL_OFFSET)

    @property
    def _stride(self) -> int:
        """Pixels of the picture for one of the network's output, on either axis."""
        return STRIDE if self.stage == ENCODER else 1

    def _start_from_another_run(self) -> None:
        if self.config.init_from is not None:
            self.left_fresh = take_weights(self.model, self.config.init_from)

    def _begin_whole_network(self) -> None:
        """From stage 1 to stage 2: the encoder of the last epoch, not of the best."""
        encoder = cast(nn.Module, self.model.encoder).state_dict()
        self._enter(WHOLE)
        self._start_from_another_run()
        cast(nn.Module, self.model.encoder).load_state_dict(encoder)
        self.progress.stage = WHOLE

    def begin(self) -> None:
        """Starts anew: what an earlier run left in the folder is removed.

        Raises:
            FileNotFoundError, ValueError: see :func:`take_weights`; nothing was removed.
        """
        self._start_from_another_run()
        self.history.restart([])
        if self.processes.first:
            # What an overwritten run left would pass for this one's.
            for name in FILE_NAMES:
                (self.out / name).unlink(missing_ok=True)

    def restore(self) -> None:
        """Takes up the run where its checkpoint stands.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of a run with other settings or data, or torchvision is
                missing and the run began with it.
        """
        tensors, meta = read_segmentation_state(self.checkpoint)
        check_same_run(self.checkpoint, meta, self.config)
        check_same_data(self.checkpoint, meta, self.data)
        self._go_on_augmenting(meta.get("by_torchvision"))
        self.progress = SegmentationProgress(**meta["progress"])
        if self.progress.stage != self.stage:
            self._enter(self.progress.stage)
        restore_tensors(self.checkpoint, self.model, self.optimizer, tensors)
        self.left_fresh = meta["left_fresh"]
        self.history.restart(meta["records"])

    def _go_on_augmenting(self, by_torchvision: bool | None) -> None:
        """In the way in which the run began, which decides its random numbers."""
        if by_torchvision and not has_torchvision():
            raise ValueError(
                f"resume: {self.checkpoint} must go on with torchvision, by which its pictures are "
                "augmented, got none: pip install pyeff[vision]"
            )
        if by_torchvision is not None:
            self.batches.by_torchvision = by_torchvision

    def save(self) -> None:
        """Writes the checkpoint: the first process does, for all."""
        self.processes.copy_buffers(self.model)
        meta = {
            **self.describe(),
            "records": self.history.records,
            "left_fresh": self.left_fresh,
            "by_torchvision": self.batches.by_torchvision,
            "train_pictures": len(self.data.split("train")),
        }
        self.processes.by_first(
            lambda: save_segmentation_state(
                self.checkpoint, self.model, self.optimizer, self.progress, meta
            )
        )

    def describe(self) -> dict[str, Any]:
        """What every file with weights keeps beside them (JSON-able)."""
        described = {**self.data.describe(), "size": list(self.config.size)}
        return {"config": self.config.to_json(), "segmentation": described}

    def run(self) -> list[SegmentationScore]:
        """Steps to the end; then the chosen weights are in ``model``, and evaluated."""
        try:
            self._train()
        finally:
            self.network = self.model  # see processes.joined
        self.processes.copy_buffers(self.model)
        if self.config.keep == "best":
            load_model_tensors(self.model, read_archive(self.best)[0], str(self.best))
        self.model.eval()
        return self._evaluate(self.data.held_out, official=self.config.eval_size == "official")

    def _train(self) -> None:
        """Steps to the end, or to a request to stop."""
        shown = self.config.progress and self.processes.first
        with StopRequest() as stop, progress_bar(self.steps, self.progress.step, shown) as bar:
            self.model.train()
            while self.progress.step < self.steps:
                if self.stage == ENCODER and self.progress.step == self.stage1_steps:
                    self._begin_whole_network()
                    self.model.train()
                stopped = self._one_step(stop, bar)
                if self.progress.step % self.steps_per_epoch == 0:
                    self._end_epoch(bar)
                if stopped:
                    self.save()
                    raise TrainingInterrupted(
                        f"stopped after step {self.progress.step} of {self.steps}; the state is in "
                        f"{self.checkpoint}"
                    )

    def _evaluate(self, split: str, *, official: bool = False) -> list[SegmentationScore]:
        return evaluate_segmentation(
            self.model,
            self.data,
            split,
            official=official,
            processes=self.processes,
            batch_size=self.config.batch_size,
        )

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step in its stage, from 0, and how many the stage has."""
        if self.stage == ENCODER:
            return step // self.steps_per_epoch, self.config.stage1_epochs
        return (step - self.stage1_steps) // self.steps_per_epoch, self.config.epochs

    def _one_step(self, stop: StopRequest, bar: Bar) -> bool:
        """Trains one step; returns whether any process was asked to stop."""
        began, step = time.perf_counter(), self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        loss = self._update(step)
        stopped = self.processes.any(stop.raised)
        self.progress.loss_sum += loss
        self.progress.loss_count += 1
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - began
        bar.advance(f"stage {self.stage} epoch {self._place(step)[0] + 1}  loss {loss:.3f}")
        return stopped

    def _learning_rate(self, step: int) -> float:
        epoch, epochs = self._place(step)
        return poly_learning_rate(epoch, epochs, peak=self.config.lr, power=self.config.power)

    def _update(self, step: int) -> float:
        """One optimiser step; returns the loss over all processes."""
        x, labels = self.batches.batch(step)
        device, autocast = self.processes.device, self.config.precision == "bf16"
        # Dropout as a function of the step, as everything else that is drawn.
        torch.manual_seed(seed_of("dropout", self.config.seed, step, self.processes.rank))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = self.network(x.to(device, self.dtype))
        # The loss itself is never rounded to bfloat16; float64 stays what it is.
        logits = logits.float() if autocast else logits
        targets = targets_for(labels, self._stride).to(device)
        loss = pixel_loss(logits, targets, self.weights, self.processes.mean)
        loss.backward()
        value = float(self.processes.mean(loss.detach()))
        if value != value or value in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"train: losses must be finite, got {value} at step {step + 1} (stage "
                f"{self.stage}, epoch {self._place(step)[0] + 1}); {kept(self.checkpoint)}; try a "
                "lower learning rate"
            )
        self.optimizer.step()
        return value

    def _end_epoch(self, bar: Bar) -> None:
        epoch, epochs = self._place(self.progress.step - 1)
        epoch, last = epoch + 1, epoch + 1 == epochs
        score = None
        if last or epoch % self.config.eval_every == 0:
            self.processes.copy_buffers(self.model)
            (score,) = self._evaluate("val")
            self._keep_best(epoch, score)
        record = {
            "stage": self.stage,
            "epoch": epoch,
            "step": self.progress.step,
            "train_loss": self.progress.loss_sum / self.progress.loss_count,
            "val_miou": None if score is None else score.miou,
            "val_pixel_accuracy": None if score is None else score.pixel_accuracy,
            "lr": self._learning_rate(self.progress.step - 1),
            "seconds": round(self.progress.seconds, 3),
        }
        self.history.add([record])
        bar.say(_epoch_line(record))
        self.progress.loss_sum, self.progress.loss_count = 0.0, 0
        if last or epoch % self.config.save_every == 0:
            self.save()

    def _keep_best(self, epoch: int, score: SegmentationScore) -> None:
        if self.stage == ENCODER or score.miou <= self.progress.best_miou:
            return
        self.progress.best_epoch, self.progress.best_miou = epoch, score.miou
        if self.config.keep == "best":
            about = {**self.describe(), "epoch": epoch}
            self.processes.by_first(lambda: save(self.model, self.best, extra=about))


def take_weights(model: nn.Module, path: str) -> list[str]:
    """Starts a network from the weights of another run.

    Args:
        model: filled with what fits by name and shape: the whole encoder, and of the rest what is
            there (not the output layer of other classes).
        path: folder or file of the run.

    Returns:
        Names of the tensors that keep their fresh values.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: its encoder is not this network's.
    """
    theirs, mine = load(path).state_dict(), model.state_dict()
    fitting = {n: t for n, t in theirs.items() if n in mine and mine[n].shape == t.shape}
    fresh = [name for name in mine if name not in fitting]
    strange = [name for name in fresh if name.startswith("encoder.")]
    if strange:
        raise ValueError(
            f"train: init_from must hold this network's encoder, got {path} without a fitting "
            f"{', '.join(strange[:4])}"
        )
    model.load_state_dict(fitting, strict=False)
    return fresh


def _epoch_line(record: Mapping[str, Any]) -> str:
    words = f"stage {record['stage']} epoch {record['epoch']:3d}   loss {record['train_loss']:.3f}"
    if record["val_miou"] is None:
        return words
    return (
        f"{words}   val mIoU {record['val_miou']:.1%}   pixels {record['val_pixel_accuracy']:.1%}"
    )
