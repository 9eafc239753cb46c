"""Labels as pictures: a colour for every class, alone or over the photograph."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyeff._extras import require
from pyeff.train.segmentation_data import IGNORE, Colour

_PURPOSE = "to write pictures"


def _table(palette: Sequence[Colour]) -> np.ndarray:
    """A colour for each of 256 labels, uint8 ``[256, 3]``; no class is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = np.array(palette, dtype=np.uint8).reshape(-1, 3)
    table[IGNORE] = 0
    return table


def coloured(labels: np.ndarray, palette: Sequence[Colour]) -> np.ndarray:
    """Labels uint8 ``[H, W]`` as colours uint8 ``[H, W, 3]``; pixels of no class are black."""
    return _table(palette)[labels]


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], opacity: float = 0.5
) -> np.ndarray:
    """A picture with its classes' colours over it.

    Args:
        image: uint8 ``[H, W, 3]``.
        labels: uint8 ``[H, W]``; pixels of no class (255) stay as they are.
        palette: a colour a class.
        opacity: 0 shows the picture alone, 1 the colours alone.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ValueError: the opacity is out of [0, 1], or picture and labels differ in size.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must be in [0, 1], got {opacity}")
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"overlay: labels must be as large as the image {list(image.shape[:2])}, got "
            f"{list(labels.shape)}"
        )
    share = np.where(labels == IGNORE, 0, opacity)[..., None].astype(np.float32)
    mixed = image + share * (coloured(labels, palette).astype(np.float32) - image)
    return (mixed + 0.5).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """A picture uint8 ``[H, W, 3]`` as the content of a PNG file.

    Raises:
        ImportError: pillow is missing.
    """
    return _saved(require("PIL.Image", "train", _PURPOSE).fromarray(image))


def label_png(labels: np.ndarray, palette: Sequence[Colour]) -> bytes:
    """Labels uint8 ``[H, W]`` as the content of a PNG file whose pixels are class numbers.

    The file has the palette in it, so that viewers show colours and programs read numbers.

    Raises:
        ImportError: pillow is missing.
    """
    height, width = labels.shape
    pillow = require("PIL.Image", "train", _PURPOSE)
    picture = pillow.frombytes("P", (width, height), np.ascontiguousarray(labels).tobytes())
    picture.putpalette(_table(palette).tobytes())
    return _saved(picture)


def _saved(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
