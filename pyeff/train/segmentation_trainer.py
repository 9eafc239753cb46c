"""Training a network for segmentation, in one process or several."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pyeff._extras import require
from pyeff.checkpoint import FILE_NAME
from pyeff.train.processes import joined
from pyeff.train.segmentation_config import SegmentationConfig, load_segmentation
from pyeff.train.segmentation_data import SegmentationData
from pyeff.train.segmentation_metrics import SegmentationScore
from pyeff.train.segmentation_session import SegmentationSession
from pyeff.train.state import check_new


@dataclass(frozen=True)
class SegmentationResult:
    """What :meth:`SegmentationTrainer.fit` returns.

    Attributes:
        model: the trained network, in eval mode, on the training device.
        scores: on the held-out split: at the training size and, if asked for, the official one.
        records: every line of ``metrics.jsonl``.
        seconds: spent in training steps, over all sessions.
        epoch: of stage 2, whose weights these are.
        left_fresh: parameters that the run it started from had none for.
    """

    model: nn.Module
    scores: list[SegmentationScore]
    records: list[dict[str, Any]]
    seconds: float
    epoch: int
    left_fresh: list[str]


class SegmentationTrainer:
    """Trains one network as a :class:`SegmentationConfig` says.

    Batches, augmentation and dropout are functions of (seed, step), so that a run which was
    interrupted and resumed ends with the weights of one that was not.

    Args:
        config: the run.
        data: the pictures; by default what ``config`` names.

    Attributes:
        first: whether this process is the one that writes files; known after :meth:`fit`.

    Example:
        >>> config = SegmentationConfig(dataset="streets", epochs=5)  # doctest: +SKIP
        >>> result = SegmentationTrainer(config).fit()  # doctest: +SKIP
    """

    def __init__(self, config: SegmentationConfig, data: SegmentationData | None = None) -> None:
        self.config = config
        self.out = Path(config.out)
        self.checkpoint = self.out / FILE_NAME
        self.first = True
        self._data = data
        self._described: dict[str, Any] = {}

    @property
    def data(self) -> SegmentationData:
        """The pictures, read when they are first needed."""
        if self._data is None:
            self._data = load_segmentation(self.config)
        return self._data

    def describe(self) -> dict[str, Any]:
        """What every file with weights keeps beside them; known after :meth:`fit`."""
        return self._described

    def fit(self, *, resume: bool = False, overwrite: bool = False) -> SegmentationResult:
        """Trains to the end.

        Args:
            resume: go on from the checkpoint in ``config.out``.
            overwrite: start anew although there is a checkpoint.

        Returns:
            The network and its scores.

        Raises:
            FileExistsError: there is a checkpoint and neither ``resume`` nor ``overwrite``.
            FileNotFoundError: ``resume`` without a checkpoint.
            ValueError: the data or the checkpoint is damaged, or the latter is of another run.
            FloatingPointError: a loss is not finite; names the step. The last checkpoint is kept.
            TrainingInterrupted: SIGINT came; the state was saved after the step.
            ImportError: torchmetrics is missing, or pillow or safetensors.
        """
        if not (resume or overwrite):
            check_new(self.checkpoint)
        # Said now, not after an epoch.
        require("torchmetrics.classification", "train", "to evaluate")
        with joined(self.config.device) as processes:
            self.first = processes.first
            session = SegmentationSession(self.config, self.data, processes)
            if resume:
                session.restore()
            else:
                session.begin()
            processes.wait()
            scores = session.run()
            self._described = session.describe()
            progress = session.progress
            best = self.config.keep == "best"
            return SegmentationResult(
                session.model,
                scores,
                session.history.records,
                progress.seconds,
                progress.best_epoch if best else self.config.epochs,
                session.left_fresh,
            )
