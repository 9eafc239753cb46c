"""Any tree of images with one folder a class."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyeff._extras import require

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_folder(
    root: Path, image_size: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Reads ``root/train/<class>/*`` and ``root/val|test/<class>/*`` into memory as RGB.

    Args:
        root: the tree.
        image_size: side in pixels to which every image is scaled (the shorter side) and centre
            cropped; ``None`` takes the images as they are, which must then share one size.

    Returns:
        Training and test ``(images uint8 [N, H, W, 3], labels int64 [N])``, and class names.

    Raises:
        ValueError: a folder is missing, the splits have different classes, an image cannot be
            read, or sizes differ; names the path.
        ImportError: pillow is missing.
    """
    if not root.is_dir():
        raise ValueError(f"folder: {root} must be a folder with train and val or test, got none")
    found = sorted(p.name for p in root.iterdir() if p.is_dir())
    held_out = next((name for name in ("val", "test") if name in found), None)
    if "train" not in found or held_out is None:
        raise ValueError(
            f"folder: {root} must hold the folders train and val (or test), got {found or 'none'}"
        )
    names = _classes(root / "train")
    other = _classes(root / held_out)
    if not set(other) <= set(names):
        raise ValueError(
            f"folder: {root / held_out} must have classes of {root / 'train'}, got also "
            f"{sorted(set(other) - set(names))}"
        )
    train = _read_split(root / "train", names, image_size)
    test = _read_split(root / held_out, names, image_size)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"folder: images of {root} must share one size, got {list(train[0].shape[1:3])} and "
            f"{list(test[0].shape[1:3])}: give an image size"
        )
    return train, test, names


def _classes(split: Path) -> list[str]:
    names = sorted(p.name for p in split.iterdir() if p.is_dir())
    if not names:
        raise ValueError(f"folder: {split} must hold one folder a class, got none")
    return names


def _read_split(split: Path, names: list[str], image_size: int | None) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((split / name).glob("**/*")):
            if path.suffix.lower() in _SUFFIXES:
                images.append(_read_image(path, image_size))
                labels.append(label)
                if images[-1].shape != images[0].shape:
                    raise ValueError(
                        f"folder: images of {split} must share one size, got "
                        f"{list(images[0].shape[:2])} and {list(images[-1].shape[:2])} ({path}): "
                        "give an image size"
                    )
    if not images:
        raise ValueError(f"folder: {split} must hold images ({sorted(_SUFFIXES)}), got none")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


def _read_image(path: Path, image_size: int | None) -> np.ndarray:
    pillow = require("PIL.Image", "train", "to read image folders")
    try:
        with pillow.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:
        # Decoders raise whatever they meet.
        raise ValueError(f"folder: {path} must be an image, got {error}") from error
    if image_size is not None:
        width, height = image.size
        scale = image_size / min(width, height)
        width, height = (
            max(image_size, round(width * scale)),
            max(image_size, round(height * scale)),
        )
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image, dtype=np.uint8)
