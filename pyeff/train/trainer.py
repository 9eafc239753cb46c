"""The training loop: nested networks on several tasks, in one process or several."""

import math
from pathlib import Path

from torch import nn

from pyeff.checkpoint import FILE_NAME, MODEL_FILE_NAME
from pyeff.train.compress_session import CompressSession
from pyeff.train.config import TrainConfig
from pyeff.train.hydranet_session import HydraSession
from pyeff.train.network import build_network, is_hydranet_family, only_task
from pyeff.train.partition_run import (
    groups_of_checkpoint,
    load_reference,
    needs_partition,
    partition,
    reference_config,
    with_groups,
)
from pyeff.train.processes import Processes, joined
from pyeff.train.session import Session, TrainResult
from pyeff.train.state import check_new, write_settings
from pyeff.train.tasks import TaskData, load_tasks


class Trainer:
    """Trains one network as a :class:`TrainConfig` says.

    A step draws a batch for each task and trains some or all levels on it, the largest first, with
    their gradients added up (Kim et al., CVPR 2019, eq. 1, un-weighted). In one process a level's
    activations are freed before the next level runs; under ``torchrun`` all levels of a step run
    inside one wrapped forward.

    Batches are functions of (seed, task, step), so that a run which was interrupted and resumed
    ends with the metrics of one that was not, and several processes with synchronised batch norm
    compute what one process does with the joint batch.

    Args:
        config: the run.
        tasks: the data; by default what ``config.tasks`` names.

    Attributes:
        first: whether this process is the one that writes files; known after :meth:`fit`.

    Example:
        >>> config = TrainConfig(tasks=("digits",), epochs=5, out="runs/digits")
        >>> result = Trainer(config).fit()  # doctest: +SKIP
    """

    def __init__(self, config: TrainConfig, tasks: list[TaskData] | None = None) -> None:
        self.config = config
        self.tasks = tasks if tasks is not None else load_config_tasks(config)
        self.out = Path(config.out)
        self.checkpoint = self.out / FILE_NAME
        self.first = True

    @property
    def steps_per_epoch(self) -> int:
        largest = max(len(task.train_labels) for task in self.tasks)
        return math.ceil(largest / self.config.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    def fit(self, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
        """Trains to the end.

        Args:
            resume: go on from the checkpoint in ``config.out``.
            overwrite: start anew although there is a checkpoint.

        Returns:
            The network and its metrics.

        Raises:
            FileExistsError: there is a checkpoint and neither ``resume`` nor ``overwrite``.
            FileNotFoundError: ``resume`` without a checkpoint.
            ValueError: the checkpoint is damaged or of another model or run.
            FloatingPointError: a loss is not finite; names the step. The last checkpoint is kept.
            TrainingInterrupted: SIGINT came; the state was saved after the step.
        """
        if not (resume or overwrite):
            check_new(self.checkpoint)
        with joined(self.config.device) as processes:
            self.first = processes.first
            early = self._needs_reference() and self._only_reference_begun()
            if needs_partition(self.config.model):
                self._settle_partition(processes, resume, overwrite)
            session = self._session_kind()(self, processes)
            if resume and not early:
                session.restore()
            else:
                session.begin()
                if processes.first:
                    # What an overwritten run left would pass for this one's.
                    (self.out / MODEL_FILE_NAME).unlink(missing_ok=True)
            processes.wait()
            return session.run()

    def _session_kind(self) -> type[Session]:
        if is_hydranet_family(self.config.model["family"]):
            return HydraSession
        return Session if self.config.compress is None else CompressSession

    def _needs_reference(self) -> bool:
        config = self.config
        return (
            needs_partition(config.model)
            and config.partition == "auto"
            and config.reference is None
        )

    def _only_reference_begun(self) -> bool:
        """Stopped while the reference classifier was trained: there is no state of its own yet."""
        reference = Path(reference_config(self.config).out) / FILE_NAME
        return reference.exists() and not self.checkpoint.exists()

    def _settle_partition(self, processes: Processes, resume: bool, overwrite: bool) -> None:
        """Puts the branch that owns each class into the run's configuration."""
        task = only_task(self.config.model, self.tasks)
        # What is wrong with the network shall be said before its reference classifier is trained.
        build_network(self.config.model, self.tasks)
        if resume and self.checkpoint.exists():
            groups = groups_of_checkpoint(self.checkpoint)
        else:
            classifier = self._reference(task, processes, resume, overwrite)
            groups = partition(self.config, task, processes, classifier)
        self.config = with_groups(self.config, groups)

    def _reference(
        self, task: TaskData, processes: Processes, resume: bool, overwrite: bool
    ) -> tuple[nn.Module, TaskData] | None:
        """The classifier by whose outputs the classes are clustered, and the data as it sees it."""
        config = self.config
        if config.partition != "auto":
            return None
        if config.reference is not None:
            return load_reference(config.reference, task, processes.device)
        if processes.first:
            write_settings(config.out, config)
        run = Trainer(reference_config(config), self.tasks)
        result = run.fit(resume=resume, overwrite=overwrite)
        return result.model, task


def load_config_tasks(config: TrainConfig) -> list[TaskData]:
    """The data that a run names; see :func:`pyeff.train.load_tasks`."""
    return load_tasks(
        config.tasks,
        Path(config.data) if config.data is not None else None,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        image_size=config.image_size,
    )
