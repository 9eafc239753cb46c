"""Models and training states on disk: one safetensors file, with the rest as JSON in its header."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyeff._archive import (
    FILE_NAME,
    FORMAT,
    MODEL_FILE_NAME,
    load_model_tensors,
    model_tensors,
    read_archive,
    write_archive,
    write_bytes_atomically,
)

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "MODEL_FILE_NAME",
    "config_differences",
    "load",
    "load_model_tensors",
    "model_config",
    "model_tensors",
    "read_archive",
    "rebuild",
    "save",
    "write_archive",
    "write_bytes_atomically",
]


def save(
    model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> None:
    """Saves a model of :mod:`pyeff.models`: weights, buffers and the configuration to rebuild it.

    Args:
        model: a model with a JSON-able ``config``, as every one of :mod:`pyeff.models` has.
        path: the file to write or replace; safetensors with JSON in its header, written atomically.
        extra: more to keep beside it (JSON-able), for example the data set's normalisation.

    Raises:
        TypeError: the model has no ``config``.
        ImportError: safetensors is missing.

    Example:
        >>> pyeff.save(model, "model.safetensors")  # doctest: +SKIP
        >>> model = pyeff.load("model.safetensors")  # doctest: +SKIP
    """
    meta = {"kind": "model", "model": model_config(model), **(extra or {})}
    write_archive(path, model_tensors(model), meta)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Loads a model that :func:`save` or ``pyeff train`` wrote.

    Args:
        path: the file, or the folder of a training run.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds other tensors than its model has.
        ImportError: safetensors is missing.

    Example:
        >>> model = pyeff.load("runs/cifar100")  # doctest: +SKIP
    """
    tensors, meta = read_archive(path)
    return rebuild(tensors, meta, os.fspath(path))


def rebuild(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], where: str) -> nn.Module:
    """The model of an archive that was read already; see :func:`load`."""
    from pyeff import models

    if "model" not in meta:
        raise ValueError(f"load: {where} must hold a model, got an archive of {meta.get('kind')!r}")
    model = models.build(meta["model"])
    load_model_tensors(model, tensors, where)
    return model.eval()


def model_config(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that rebuild a model.

    Raises:
        TypeError: the model has none.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        raise TypeError(
            f"save: model must have a config (a model of pyeff.models), got {type(model).__name__}"
        )
    return config


def config_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one line a key, in the order of the keys."""
    keys = sorted(set(found) | set(wanted))
    nothing = "(not set)"
    return [
        f"{key}: {found.get(key, nothing)!r} in the checkpoint, {wanted.get(key, nothing)!r} here"
        for key in keys
        if _plain(found.get(key, nothing)) != _plain(wanted.get(key, nothing))
    ]


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, so that tuples equal lists."""
    return json.loads(json.dumps(value))
