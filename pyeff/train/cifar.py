"""CIFAR-10 and CIFAR-100 from the folders that their authors publish."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_LABELS = {"fine": "fine_labels", "coarse": "coarse_labels"}

# What an array is pickled as, by NumPy 1 (and Python 2) and by NumPy 2.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and arrays; refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR file")
        if hasattr(np, "_core"):
            module = module.replace("numpy.core.", "numpy._core.")
        else:
            module = module.replace("numpy._core.", "numpy.core.")
        return super().find_class(module, name)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:
        # A damaged pickle raises nearly any type there is.
        raise ValueError(f"cifar: {path} must be a CIFAR python file, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cifar: {path} must hold a dict, got {type(content).__name__}")
    return content


def _entry(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise ValueError(f"cifar: {path} must hold {key!r}, got the keys {sorted(content)}")
    return content[key]


def _images(content: dict[str, Any], path: Path) -> Tensor:
    data = np.asarray(_entry(content, "data", path))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(
            f"cifar: {path} must hold uint8 images [N, 3072], got {data.dtype} {list(data.shape)}"
        )
    if not len(data):
        raise ValueError(f"cifar: {path} must hold images, got none")
    planes = torch.from_numpy(np.array(data)).view(-1, 3, 32, 32)
    return planes.permute(0, 2, 3, 1).contiguous()


def _labels(content: dict[str, Any], key: str, images: int, classes: int, path: Path) -> Tensor:
    labels = torch.as_tensor(np.asarray(_entry(content, key, path)), dtype=torch.int64)
    if labels.shape != (images,):
        raise ValueError(f"cifar: {path} must hold {images} {key}, got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ValueError(f"cifar: {path} must hold {key} in 0..{classes - 1}, got {low}..{high}")
    return labels


def _folder(data: Path | None, kind: str, files: tuple[str, ...]) -> Path:
    name = _FOLDERS[kind]
    if data is None:
        raise ValueError(f"{kind}: data must name the folder that holds {name}, got none")
    root = data if data.name == name else data / name
    found = sorted(p.name for p in root.iterdir()) if root.is_dir() else None
    missing = [f for f in files if found is None or f not in found]
    if missing:
        if found is not None:
            state = f"a folder that holds {found or 'nothing'}"
        elif data.is_dir():
            state = f"no such folder; {data} holds {sorted(p.name for p in data.iterdir())[:12]}"
        else:
            state = f"no such folder; {data} does not exist"
        raise ValueError(f"{kind}: {root} must hold the files {list(files)}, got {state}")
    return root


def read_cifar100(
    data: Path | None, labels: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Reads CIFAR-100 with its fine (100) or coarse (20) labels.

    Args:
        data: the folder that holds ``cifar-100-python``, or that folder itself.
        labels: ``"fine"`` or ``"coarse"``.

    Returns:
        Training and test ``(images uint8 [N, 32, 32, 3], labels int64 [N])``, and class names.

    Raises:
        ValueError: a folder or file is missing or broken; names the path, what was expected and
            what was found.
    """
    root = _folder(data, "cifar100", ("train", "test", "meta"))
    meta = _read(root / "meta")
    names = [str(n) for n in _entry(meta, f"{labels}_label_names", root / "meta")]
    splits = []
    for split in ("train", "test"):
        content = _read(root / split)
        images = _images(content, root / split)
        splits.append(
            (images, _labels(content, _LABELS[labels], len(images), len(names), root / split))
        )
    return splits[0], splits[1], names


def read_cifar10(
    data: Path | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Reads CIFAR-10, as many of its ``data_batch_*`` files as are there.

    Args:
        data: the folder that holds ``cifar-10-batches-py``, or that folder itself.

    Returns:
        Training and test ``(images uint8 [N, 32, 32, 3], labels int64 [N])``, and class names.

    Raises:
        ValueError: a folder or file is missing or broken; names the path, what was expected and
            what was found.
    """
    root = _folder(data, "cifar10", ("test_batch", "batches.meta"))
    batches = sorted(root.glob("data_batch_*"))
    if not batches:
        found = sorted(p.name for p in root.iterdir())
        raise ValueError(f"cifar10: {root} must hold data_batch_1 and on, got {found}")
    names = [str(n) for n in _entry(_read(root / "batches.meta"), "label_names", root)]
    parts = []
    for path in [*batches, root / "test_batch"]:
        content = _read(path)
        images = _images(content, path)
        parts.append((images, _labels(content, "labels", len(images), len(names), path)))
    train = (torch.cat([p[0] for p in parts[:-1]]), torch.cat([p[1] for p in parts[:-1]]))
    return train, parts[-1], names
