"""A training run on disk: everything that the next step depends on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.checkpoint import (
    FILE_NAME,
    config_differences,
    load_model_tensors,
    model_config,
    model_tensors,
    read_archive,
    write_archive,
    write_bytes_atomically,
)
from pyeff.train.config import TrainConfig, config_from_json
from pyeff.train.optimizer import load_optimizer_tensors, optimizer_tensors

_RANDOM = "random.cpu"
_LOSS_SUM, _LOSS_COUNT = "progress.loss_sum", "progress.loss_count"
_COUNTS = "progress.counts."
SETTINGS_FILE_NAME = "settings.json"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        loss_sum: of this epoch's steps so far, float64 ``[tasks, levels]``.
        loss_count: how many losses are in each sum, float64 ``[tasks, levels]``.
        seconds: spent in training so far, over all sessions.
        counts: of this epoch's steps so far, what else is counted (a HydraNet's gate); by name.
    """

    step: int
    loss_sum: Tensor
    loss_count: Tensor
    seconds: float = 0.0
    counts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, tasks: int, levels: int) -> "Progress":
        zeros = torch.zeros(tasks, levels, dtype=torch.float64)
        return cls(0, zeros.clone(), zeros.clone())


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    progress: Progress,
    meta: dict[str, Any],
) -> None:
    """Writes a run's state, atomically.

    Args:
        path: the file to write or replace.
        model: with its ``config``.
        optimizer: whose momentum is kept.
        progress: where the run stands.
        meta: more to keep (JSON-able): the run's configuration, its tasks, the metrics so far.

    Raises:
        FloatingPointError: a weight is not finite; the file that stands already is kept.
    """
    check_finite(model, progress.step, path)
    tensors = {
        **model_tensors(model),
        **optimizer_tensors(model, optimizer),
        _RANDOM: torch.get_rng_state(),
        _LOSS_SUM: progress.loss_sum,
        _LOSS_COUNT: progress.loss_count,
        **{_COUNTS + name: count for name, count in progress.counts.items()},
    }
    document = {
        **meta,
        "kind": "training",
        "model": model_config(model),
        "step": progress.step,
        "seconds": progress.seconds,
    }
    write_archive(path, tensors, document)


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, deciding: dict[str, Any]
) -> tuple[Progress, dict[str, Any]]:
    """Restores a run's state exactly.

    Args:
        path: what :func:`save_state` wrote.
        model: of the same configuration; filled.
        optimizer: over its parameters; filled.
        deciding: the settings of this run that decide its result.

    Returns:
        Where the run stands, and the other things that were kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another model, or of a run with other settings; the message
            lists what differs.
    """
    tensors, meta = read_archive(path)
    if meta.get("kind") != "training":
        raise ValueError(f"resume: {path} must be a training run, got a {meta.get('kind')}")
    differences = config_differences(meta["model"], model_config(model))
    if differences:
        raise ValueError(
            f"resume: {path} must be of the same model, got: " + "; ".join(differences)
        )
    # Through TrainConfig, so that a setting that did not exist yet has its default.
    differences = config_differences(config_from_json(meta["config"]).deciding(), deciding)
    if differences:
        raise ValueError(
            f"resume: {path} must be of a run with the same settings, got: "
            + "; ".join(differences)
        )
    load_model_tensors(model, tensors, str(path))
    load_optimizer_tensors(model, optimizer, tensors)
    torch.set_rng_state(tensors[_RANDOM])
    progress = Progress(
        int(meta["step"]),
        tensors[_LOSS_SUM],
        tensors[_LOSS_COUNT],
        float(meta["seconds"]),
        {n.removeprefix(_COUNTS): t for n, t in tensors.items() if n.startswith(_COUNTS)},
    )
    return progress, meta


def check_new(path: Path) -> None:
    """Refuses to start a run over another one.

    Args:
        path: of its checkpoint.

    Raises:
        FileExistsError: there is one.
    """
    if path.exists():
        raise FileExistsError(
            f"train: {path.parent} must be a new folder, got one with a checkpoint: resume it, "
            "overwrite it, or choose another"
        )


def check_finite(model: nn.Module, step: int, path: Path) -> None:
    """Refuses to replace a good checkpoint by weights that are spoilt.

    Args:
        model: about to be saved.
        step: steps done.
        path: the checkpoint.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(
                f"train: weights must be finite to be saved, got {name} after step {step} with "
                f"values that are not; {kept(path)}"
            )


def kept(path: Path) -> str:
    """The end of an error message: which checkpoint is still good."""
    return (
        f"the last good checkpoint is {path}" if path.is_file() else "no checkpoint was written yet"
    )


def write_settings(out: str, config: TrainConfig) -> None:
    """Writes a run's settings to its folder, for the time before it has a checkpoint of its own."""
    text = json.dumps(config.to_json(), indent=1) + "\n"
    write_bytes_atomically(Path(out) / SETTINGS_FILE_NAME, text.encode())


def read_config(out: str) -> dict[str, Any]:
    """The settings of a run, as JSON: those of its checkpoint, or what :func:`write_settings` left.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the checkpoint is damaged, or not a training run's.
    """
    path, settings = Path(out) / FILE_NAME, Path(out) / SETTINGS_FILE_NAME
    if settings.is_file() and not path.is_file():
        left: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        return left
    _, meta = read_archive(path)
    if meta.get("kind") != "training":
        raise ValueError(f"resume: {path} must be a training run, got a {meta.get('kind')}")
    config: dict[str, Any] = meta["config"]
    return config
