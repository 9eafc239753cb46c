"""Mean intersection over union and pixel accuracy of a network."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyeff._extras import require
from pyeff.train.evaluate import evaluating
from pyeff.train.processes import Processes
from pyeff.train.segmentation_augment import to_input
from pyeff.train.segmentation_data import IGNORE, SegmentationData

EVAL_SIZES = ("training", "official")


@dataclass(frozen=True)
class SegmentationScore:
    """How well a network labels the pixels of a split.

    Attributes:
        split: ``val`` or ``test``.
        eval_size: ``training``: prediction and label at the size that the network is fed with;
            ``official``: the logits are scaled up to the label's own size.
        size: ``(H, W)`` of the labels; ``None`` where they differ.
        images: how many there were.
        miou: mean over the classes of intersection over union, 0..1. A class that is neither
            predicted nor labelled anywhere is left out.
        pixel_accuracy: share of the labelled pixels that are right, 0..1.
        class_iou: one a class; ``None`` for one that was left out.
    """

    split: str
    eval_size: str
    size: tuple[int, int] | None
    images: int
    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Counter:
    """Counts pixels by label and prediction at one size."""

    def __init__(self, classes: int, device: torch.device) -> None:
        classification = require("torchmetrics.classification", "train", "to evaluate")
        self._metric = classification.MulticlassConfusionMatrix(
            classes, ignore_index=IGNORE, validate_args=False
        ).to(device)
        # Labels, and the sums of their heights, of the squares of these, of widths and of squares.
        self._sides = torch.zeros(5, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts logits ``[N, classes, h, w]``, scaled to the size of labels ``[N, H, W]``."""
        size = (labels.shape[1], labels.shape[2])
        if logits.shape[2:] != size:
            logits = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        self._metric.update(logits.argmax(1), labels.long())
        height, width = size
        sums = [1, height, height * height, width, width * width]
        self._sides += len(labels) * torch.tensor(sums, device=self._sides.device)

    def confusion(self) -> Tensor:
        """Pixels by label (rows) and prediction (columns), over all processes, float64."""
        counts: Tensor = self._metric.compute()
        return counts.double()

    def size(self, processes: Processes | None) -> tuple[int, int] | None:
        """Of all labels over all processes; ``None`` where they differ, or there are none."""
        sides = self._sides if processes is None else processes.sum(self._sides)
        count, height, heights, width, widths = sides.tolist()
        # The mean of squares is the square of the mean only where all are alike.
        alike = count * heights == height * height and count * widths == width * width
        return (height // count, width // count) if count and alike else None


def evaluate_segmentation(
    model: nn.Module,
    data: SegmentationData,
    split: str,
    *,
    official: bool = False,
    processes: Processes | None = None,
    batch_size: int = 8,
    autocast: bool = False,
) -> list[SegmentationScore]:
    """Runs a network on a split.

    Args:
        model: ``[N, 3, H, W]`` to logits ``[N, classes, h, w]``.
        data: the data set.
        split: one of its splits.
        official: also count at the labels' own size, in the same pass.
        processes: who shares the work; each takes every so manieth picture. ``None`` is this
            process alone.
        batch_size: pictures a call.
        autocast: run the network in bfloat16 where autocast allows.

    Returns:
        The score at the training size and, if asked for, at the official one; alike in every
        process.

    Raises:
        ValueError: the data has no such split.
        ImportError: torchmetrics is missing.
    """
    chosen, like = data.split(split), next(model.parameters())
    rank, ranks = (processes.rank, processes.ranks) if processes else (0, 1)
    counters = {name: _Counter(data.classes, like.device) for name in EVAL_SIZES[: 1 + official]}
    mine = list(range(rank, len(chosen), ranks))
    with evaluating(model):
        for begin in range(0, len(mine), batch_size):
            indices = mine[begin : begin + batch_size]
            x = to_input(chosen.images[indices]).to(like.device, like.dtype)
            with torch.autocast(like.device.type, torch.bfloat16, enabled=autocast):
                logits = model(x)
            logits = logits.float() if autocast else logits
            counters["training"].add(logits, chosen.labels[indices].to(like.device))
            if official:
                for row, index in enumerate(indices):
                    label = chosen.own_label(index).to(like.device)
                    counters["official"].add(logits[row : row + 1], label.unsqueeze(0))
        return [
            score_of(counter.confusion(), data, split, name, counter.size(processes), len(chosen))
            for name, counter in counters.items()
        ]


def score_of(
    confusion: Tensor,
    data: SegmentationData,
    split: str,
    eval_size: str,
    size: tuple[int, int] | None,
    images: int,
) -> SegmentationScore:
    """The score of counted pixels.

    Args:
        confusion: pixels by label (rows) and prediction (columns), ``[classes, classes]``.
        data: whose classes they are.
        split: what was run.
        eval_size: at which size, by name.
        size: of the labels, if it is one.
        images: how many there were.
    """
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    seen = union > 0
    iou = right[seen] / union[seen]
    found = iter(iou.tolist())
    return SegmentationScore(
        split=split,
        eval_size=eval_size,
        size=size,
        images=images,
        miou=float(iou.mean()) if len(iou) else 0.0,
        pixel_accuracy=float(right.sum() / confusion.sum().clamp_min(1)),
        class_iou={
            name: next(found) if there else None
            for name, there in zip(data.class_names, seen.tolist(), strict=True)
        },
    )
