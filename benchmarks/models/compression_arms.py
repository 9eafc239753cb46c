"""The runs of the compression scripts: what each arm trains, from what, and in which folder.

Part of compression_cifar100.py and compression_chars74k.py. Arms, for a share of the parameters
that shall be left:

- dense: the network as it is;
- group, sgl, lowrank, both: penalties to the last epoch, then removal and factorisation, without
  any training after them;
- reload: as both, but the network is made smaller after a given epoch and trained on;
- posthoc: dense, its smallest channels and singular values taken away after training until it has
  the size of both; batch norm statistics are computed anew, nothing is trained;
- tuned: posthoc, then trained for the epochs that a reload arm has left, at its learning rates
  (the minutes are of these epochs alone);
- small: layers as both left them, with fresh weights, trained from the start.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_by_hand import compressed_to
from torch import Tensor, nn

import pyeff
from pyeff import models
from pyeff.checkpoint import FILE_NAME, model_config
from pyeff.compress import zero_smallest
from pyeff.train import TaskData, TrainConfig, evaluate, load_config_tasks
from pyeff.train.batches import normalise
from pyeff.train.calibrate import calibrate
from pyeff.train.compress_options import GROUP_OPTIONS
from pyeff.train.processes import joined
from pyeff.train.report import level_results, print_results, train_and_report, write_report
from pyeff.train.session import Session, TrainResult
from pyeff.train.trainer import Trainer

PENALTIES: dict[str, dict[str, Any]] = {
    "group": {"group": "auto"},
    "sgl": {"group": "auto", "alpha": 0.5},
    "lowrank": {"rank": "auto"},
    "both": {"group": "auto", "rank": "auto"},
}
# Arms that another arm's run must come before: what they are made of.
AFTER = {"posthoc": ("dense", "both"), "tuned": ("posthoc",), "small": ("both",)}
KINDS = ("dense", *PENALTIES, "reload", "posthoc", "tuned", "small")
# Training images, in batches, from which statistics are computed anew.
CALIBRATION = 20


@dataclass(frozen=True)
class Arm:
    """One way to a network of some size.

    Attributes:
        kind: one of :data:`KINDS`.
        target: share of the parameters that shall be left; ``None`` for dense.
        epoch: of reload and tuned: after how many epochs the network is made smaller.
    """

    kind: str
    target: float | None = None
    epoch: int | None = None

    @property
    def name(self) -> str:
        """Of its folders and rows."""
        epoch = "" if self.epoch is None else str(self.epoch)
        share = "" if self.target is None else f"_{self.target:g}"
        return f"{self.kind}{epoch}{share}"


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        name: of the network; the first part of its folders.
        task: words of the task.
        model: the network, as ``TrainConfig`` takes it.
        data: folder of the data set.
        runs: folder of the runs.
        recipe: settings of all runs.
        penalties: further options of every arm with penalties.
        arms: in an order in which each comes after what it is made of.
        seeds: of the arms named in ``headline``.
        ablation_seeds: of the others.
        headline: names of arms.
    """

    name: str
    task: str
    model: dict[str, Any]
    data: Path
    runs: Path
    recipe: dict[str, Any]
    penalties: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    headline: frozenset[str]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Which seeds an arm is trained with."""
        return self.seeds if arm.name in self.headline else self.ablation_seeds

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where a run is."""
        return self.runs / f"{self.name}_{arm.name}_s{seed}"

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """One run."""
        settings: dict[str, Any] = {}
        penalties = PENALTIES.get("both" if arm.kind == "reload" else arm.kind)
        if penalties is not None:
            idle = () if "group" in penalties else GROUP_OPTIONS
            further = {k: v for k, v in self.penalties.items() if k not in idle}
            settings["compress"] = {**penalties, **further}
            settings["target_params"] = arm.target
            settings["reload_epoch"] = arm.epoch
        return TrainConfig(
            tasks=(self.task,),
            model=self.model,
            data=str(self.data),
            out=str(self.folder(arm, seed)),
            seed=seed,
            **{"eval_every": self.recipe["epochs"], **self.recipe, **settings},
        )


def arms_of(
    kinds: Sequence[str], targets: Sequence[float], reloads: Sequence[int]
) -> tuple[Arm, ...]:
    """All arms of some kinds.

    Args:
        kinds: in any order.
        targets: shares of the parameters; reload, tuned and sgl are run for the first one only.
        reloads: epochs of the reload arms; the middle one is the tuned arm's.
    """
    arms = []
    for kind in (kind for kind in KINDS if kind in kinds):
        first = targets[0]
        if kind == "dense":
            arms.append(Arm(kind))
        elif kind == "reload":
            arms += [Arm(kind, first, epoch) for epoch in reloads]
        elif kind == "tuned":
            arms.append(Arm(kind, first, sorted(reloads)[len(reloads) // 2]))
        elif kind == "sgl":
            arms.append(Arm(kind, first))
        else:
            arms += [Arm(kind, target) for target in targets]
    return tuple(arms)


def train(plan: Plan, arms: Sequence[Arm]) -> None:
    """Trains the runs of some arms that are not finished.

    Raises:
        SystemExit: an arm is made of another that has not been trained.
    """
    for arm in arms:
        for seed in plan.seeds_of(arm):
            folder = plan.folder(arm, seed)
            if (folder / "results.json").exists():
                continue
            if arm.kind == "posthoc":
                _shrink_afterwards(plan, arm, seed)
            elif arm.kind in AFTER:
                _train_network(plan, arm, seed)
            else:
                begun = (folder / FILE_NAME).exists()
                train_and_report(plan.config(arm, seed), resume=begun)


def made_of(plan: Plan, arm: Arm, seed: int) -> list[Path]:
    """The finished runs that an arm is made of.

    Raises:
        SystemExit: one of them is not finished.
    """
    folders = []
    for kind in AFTER[arm.kind]:
        other = Arm(kind, None if kind == "dense" else arm.target)
        folders.append(plan.folder(other, seed))
        if not (folders[-1] / "results.json").exists():
            raise SystemExit(f"{arm.name}: {folders[-1]} must be trained first, got no results")
    return folders


def _shrink_afterwards(plan: Plan, arm: Arm, seed: int) -> None:
    """The posthoc arm's run: no step of training."""
    dense, both = made_of(plan, arm, seed)
    config = plan.config(arm, seed)
    (task,) = load_config_tasks(config)
    began = time.perf_counter()
    model = pyeff.load(dense)
    wanted = json.loads((both / "compression.json").read_text())["parameters"]
    share = wanted[1] / wanted[0]
    example = _images(task, 0, 1)
    # The penalties share the way to the size as they do in training.
    zero_smallest(model, example, target_params=share**0.5)
    recalibrate(model, task, config.batch_size)
    made = compressed_to(model, example, share)
    recalibrate(made.model, task, config.batch_size)
    accuracy = evaluate(made.model.eval(), [task])
    seconds = time.perf_counter() - began
    result = TrainResult(made.model, accuracy, [], seconds, compressed=made.to_json())
    shapes = {task.name: task.image_shape}
    lines = level_results(made.model, shapes, accuracy)
    write_report(plan.folder(arm, seed), config, [task], result, lines)
    print_results(lines)


def recalibrate(model: nn.Module, task: TaskData, size: int) -> None:
    """Batch norm statistics from training images, without augmentation."""
    count = min(CALIBRATION * size, len(task.train_labels))
    batches = [_images(task, at, min(at + size, count)) for at in range(0, count, size)]
    calibrate(model, {task.name: batches})


def _images(task: TaskData, begin: int, end: int) -> Tensor:
    return normalise(task.train_images[begin:end], task.mean, task.std)


def _train_network(plan: Plan, arm: Arm, seed: int) -> None:
    """A run that starts from a network that no configuration alone describes.

    A tuned network starts where the reload arm's smaller network does, with the same batches and
    learning rates to come; a small one at the first step.
    """
    start = pyeff.load(made_of(plan, arm, seed)[0])
    trainer = Trainer(plan.config(arm, seed))
    with joined(trainer.config.device) as processes:
        session = Session(trainer, processes)
        if arm.kind == "small":
            # Fresh weights, from the run's seed as all networks' are.
            start = models.build(model_config(start))
        session.take(copy.deepcopy(start))
        if trainer.checkpoint.exists():
            session.restore()
        else:
            session.history.restart([])
            session.progress.step = (arm.epoch or 0) * trainer.steps_per_epoch
        result = session.run()
    shapes = {task.name: task.image_shape for task in trainer.tasks}
    lines = level_results(result.model, shapes, result.accuracy)
    write_report(trainer.out, trainer.config, trainer.tasks, result, lines)
    print_results(lines)
