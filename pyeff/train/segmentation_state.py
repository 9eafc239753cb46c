"""A run for segmentation on disk: everything that the next step depends on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.checkpoint import (
    FILE_NAME,
    MODEL_FILE_NAME,
    config_differences,
    load_model_tensors,
    model_config,
    model_tensors,
    read_archive,
    write_archive,
)
from pyeff.train.segmentation_config import SegmentationConfig, segmentation_config_from_json
from pyeff.train.segmentation_data import SegmentationData
from pyeff.train.state import check_finite

KIND = "segmentation training"
BEST_FILE_NAME = "best.safetensors"
RESULTS_FILE_NAME = "results.json"
COURSE_FILE_NAME, FRAMES_FILE_NAME = "course.png", "frames.png"
# All but the metrics, which are written anew.
FILE_NAMES = (
    FILE_NAME,
    MODEL_FILE_NAME,
    BEST_FILE_NAME,
    RESULTS_FILE_NAME,
    COURSE_FILE_NAME,
    FRAMES_FILE_NAME,
)
_ADAM = "optimizer."
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class SegmentationProgress:
    """Where a run stands.

    Attributes:
        stage: 1 for the encoder alone, 2 for the whole network; whose weights are kept beside.
        step: steps done, over both stages.
        loss_sum: of this epoch's steps so far.
        loss_count: how many losses are in the sum.
        seconds: spent in training steps so far, over all sessions.
        best_epoch: of stage 2, from 1; 0 before the first evaluation.
        best_miou: of that epoch.
    """

    stage: int
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_miou: float = -1.0


def adam_tensors(model: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """The moments and step counts of Adam, by the parameter's name."""
    return {
        f"{_ADAM}{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_adam_tensors(
    model: nn.Module, optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]
) -> None:
    """Restores what :func:`adam_tensors` gave; a parameter without an entry has no moments.

    Raises:
        ValueError: a parameter has some of its entries, or entries of another shape.
    """
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        saved = {m: tensors.get(f"{_ADAM}{m}.{name}") for m in _MOMENTS}
        first, second, count = (saved[m] for m in _MOMENTS)
        if first is None and second is None and count is None:
            continue
        shapes = [None if t is None else list(t.shape) for t in (first, second, count)]
        if first is None or second is None or count is None or first.shape != parameter.shape:
            raise ValueError(
                f"resume: {name} must have all of Adam's {', '.join(_MOMENTS)} in its shape "
                f"{list(parameter.shape)}, got {shapes}"
            )
        optimizer.state[parameter] = {
            "step": count,
            "exp_avg": torch.empty_like(parameter, requires_grad=False).copy_(first),
            "exp_avg_sq": torch.empty_like(parameter, requires_grad=False).copy_(second),
        }


def save_segmentation_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Adam,
    progress: SegmentationProgress,
    meta: Mapping[str, Any],
) -> None:
    """Writes a run's state, atomically.

    Args:
        path: the file to write or replace.
        model: of the stage that the run is in, with its ``config``.
        optimizer: whose moments are kept.
        progress: where the run stands.
        meta: more to keep (JSON-able): the run's configuration, its data, the metrics so far.

    Raises:
        FloatingPointError: a weight is not finite; the file that stands already is kept.
    """
    check_finite(model, progress.step, path)
    document = {
        **meta,
        "kind": KIND,
        "model": model_config(model),
        "progress": asdict(progress),
    }
    write_archive(path, {**model_tensors(model), **adam_tensors(model, optimizer)}, document)


def read_segmentation_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`save_segmentation_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another kind of run.
    """
    tensors, meta = read_archive(path)
    if meta.get("kind") != KIND:
        raise ValueError(
            f"resume: {path} must be a run of pyeff train erfnet, got a {meta.get('kind')}"
        )
    return tensors, meta


def check_same_run(path: Path, meta: Mapping[str, Any], config: SegmentationConfig) -> None:
    """Refuses to go on with a run of other settings.

    Raises:
        ValueError: lists what differs.
    """
    before = segmentation_config_from_json(meta["config"]).deciding()
    differences = config_differences(before, config.deciding())
    if differences:
        raise ValueError(
            f"resume: {path} must be of a run with the same settings, got: "
            + "; ".join(differences)
        )


def check_same_data(path: Path, meta: Mapping[str, Any], data: SegmentationData) -> None:
    """Refuses to go on with other data: other classes, or another number of steps in an epoch.

    Raises:
        ValueError: says what differs.
    """
    if meta["segmentation"]["class_names"] != list(data.class_names):
        raise ValueError(
            f"resume: {path} must be of a run with the classes {list(data.class_names)}, got "
            f"{meta['segmentation']['class_names']}"
        )
    # Older checkpoints do not know it.
    before, here = meta.get("train_pictures"), len(data.split("train"))
    if before is not None and before != here:
        raise ValueError(
            f"resume: {path} must be of a run with {here} training pictures, got {before}"
        )


def restore_tensors(
    path: Path, model: nn.Module, optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]
) -> None:
    """Fills a stage's network and optimiser."""
    load_model_tensors(model, tensors, str(path))
    load_adam_tensors(model, optimizer, tensors)
