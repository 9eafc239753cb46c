"""Named tensors and a JSON document as one safetensors file.

One file is what makes a write atomic: it is written beside its target, flushed and renamed, so
a reader sees the old file or the new one. Nothing is pickled. A checksum over the tensors shows
the damage that safetensors itself does not look for.
"""

import json
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyeff._extras import require

FORMAT = 1
FILE_NAME = "checkpoint.safetensors"
MODEL_FILE_NAME = "model.safetensors"
_MODEL = "model."
_PURPOSE = "to read and write checkpoints"


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under a temporary name in its own folder and renames it into place.

    Args:
        path: the file; its folder is made if it is missing.
        content: what it shall hold.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result is as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_archive(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Writes named tensors and a JSON document as one safetensors file, atomically.

    Args:
        path: the file to write or replace.
        tensors: names to tensors of any shape, dtype and device; copied to the CPU.
        meta: a JSON-able document.

    Raises:
        TypeError: ``meta`` holds something that JSON does not.
        ImportError: safetensors is missing.
    """
    safetensors = require("safetensors.torch", "train", _PURPOSE)
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    header = {
        "format": str(FORMAT),
        "checksum": f"{_checksum(plain.items()):08x}",
        # Never sorted: the order of the tasks decides which head and start unit is whose.
        "pyeff": json.dumps(meta),
    }
    write_bytes_atomically(path, safetensors.save(plain, metadata=header))


def read_archive(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write_archive` wrote.

    Args:
        path: the file, or the folder of a run: its ``model.safetensors`` if it is finished, else
            its ``checkpoint.safetensors``.

    Returns:
        The tensors on the CPU, and the JSON document.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or not one of pyeff's.
        ImportError: safetensors is missing.
    """
    safetensors = require("safetensors", "train", _PURPOSE)
    file = Path(path)
    if file.is_dir():
        finished = file / MODEL_FILE_NAME
        file = finished if finished.is_file() else file / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: path must name a checkpoint file, got {file}")
    try:
        with safetensors.safe_open(file, framework="pt") as archive:
            header = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {file} must be a whole safetensors file, got one that is truncated or "
            f"damaged ({error})"
        ) from error
    if "pyeff" not in header or "checksum" not in header:
        raise ValueError(
            f"checkpoint: {file} must be written by pyeff, got another safetensors file"
        )
    if header.get("format") != str(FORMAT):
        raise ValueError(
            f"checkpoint: {file} must have format {FORMAT}, got {header.get('format')!r}: it was "
            "written by another version of pyeff"
        )
    found = f"{_checksum(sorted(tensors.items())):08x}"
    if found != header["checksum"]:
        raise ValueError(
            f"checkpoint: {file} must have checksum {header['checksum']}, got {found}: damaged"
        )
    return tensors, json.loads(header["pyeff"])


def _checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    value = 0
    for name, tensor in tensors:
        value = zlib.crc32(name.encode(), value)
        flat = tensor.contiguous().reshape(-1)
        if flat.numel():
            value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict under the names that :func:`load_model_tensors` looks for."""
    return {_MODEL + name: tensor for name, tensor in model.state_dict().items()}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies the model's part of an archive into a model, or says what does not fit.

    Args:
        model: the model to fill.
        tensors: what :func:`read_archive` gave.
        where: the file's name, for the message.

    Raises:
        ValueError: names or shapes differ; the message lists them.
    """
    found = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
    wanted = model.state_dict()
    trouble = [f"missing {name}" for name in wanted if name not in found]
    trouble += [f"unknown {name}" for name in found if name not in wanted]
    trouble += [
        f"{name} is {list(found[name].shape)}, the model has {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if trouble:
        shown = "; ".join(trouble[:8]) + (f"; and {len(trouble) - 8} more" if trouble[8:] else "")
        raise ValueError(f"load: {where} must hold the tensors of this model, got: {shown}")
    for name, tensor in found.items():
        if wanted[name].dtype != tensor.dtype and tensor.dtype == torch.float64:
            model.double()
            break
    state: Any = OrderedDict(found)
    # The versions of the layers' formats, without which some refuse a state dict.
    state._metadata = getattr(wanted, "_metadata", {})
    model.load_state_dict(state)
