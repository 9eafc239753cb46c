"""Procedural street scenes with CamVid's classes: data without any file or download."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyeff._extras import require
from pyeff.train.batches import seed_of
from pyeff.train.camvid import CLASSES, PALETTE
from pyeff.train.segmentation_data import Reading, SegmentationData, SegmentationSplit, each_of
from pyeff.train.street_scene import (
    Camera,
    Canvas,
    Street,
    draw_ground,
    draw_sky,
    draw_walls,
    finish,
)
from pyeff.train.street_things import draw_things

HELD_OUT = {"val": 60, "test": 100}
_SMALL = 128


def street_scene(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene.

    Args:
        seed: decides everything in it.
        size: ``(H, W)`` in pixels.

    Returns:
        The picture uint8 ``[H, W, 3]`` and its classes uint8 ``[H, W]``, 0..10; no pixel is void.

    Raises:
        ImportError: pillow is missing.
    """
    rng = np.random.default_rng(seed)
    # Small pictures are drawn at twice their size, or thin things would come and go.
    scale = 2 if size[0] < _SMALL else 1
    height, width = size[0] * scale, size[1] * scale
    centre = width * rng.uniform(0.38, 0.62), height * rng.uniform(0.42, 0.57)
    camera = Camera(
        focal=width * rng.uniform(0.7, 1.05),
        centre=centre,
        eye=rng.uniform(1.2, 1.8),
        turn=rng.normal(0, 0.07),
        roll=rng.normal(0, 0.012),
    )
    canvas = Canvas(camera, height, width)
    street = _street(rng)
    haze = draw_sky(canvas, rng)
    draw_ground(canvas, street, rng)
    draw_walls(canvas, street, rng)
    draw_things(canvas, street, rng)
    finish(canvas, haze, rng)
    return _photograph(canvas, scale, rng), canvas.label[scale // 2 :: scale, scale // 2 :: scale]


def _street(rng: np.random.Generator) -> Street:
    half = rng.uniform(3, 6.5)
    left = -half - rng.uniform(-0.55, 0.35) * half
    walls = rng.uniform(1.5, 4.5, 2) + rng.choice([0.0, 0.0, 3.5], 2)
    return Street(left, left + 2 * half, left - walls[0], left + 2 * half + walls[1])


def _photograph(canvas: Canvas, scale: int, rng: np.random.Generator) -> np.ndarray:
    """The lens's blur and the sensor's noise."""
    pillow = require("PIL.Image", "train", "to draw street scenes")
    filters = require("PIL.ImageFilter", "train", "to draw street scenes")
    picture = pillow.fromarray((canvas.image * 255).astype(np.uint8))
    picture = picture.filter(filters.GaussianBlur(scale * rng.uniform(0.2, 0.7)))
    if scale > 1:
        size = canvas.width // scale, canvas.height // scale
        picture = picture.resize(size, pillow.Resampling.BOX)
    values = np.asarray(picture, dtype=np.float32)
    noise = rng.standard_normal(values.shape, dtype=np.float32) * np.float32(rng.uniform(1, 6))
    return np.clip(values + noise, 0, 255).astype(np.uint8)


def read_streets(reading: Reading, scenes: int = 400) -> SegmentationData:
    """Draws a data set of street scenes, the same ones at every call.

    Args:
        reading: at which size, and at most how many.
        scenes: how many to learn from; beside them 60 for ``val`` and 100 for ``test``.

    Returns:
        The data, up to three splits with CamVid's 11 classes.

    Raises:
        ImportError: pillow is missing.
    """
    counts = {"train": scenes, **HELD_OUT}
    splits = {}
    for split in (name for name in counts if name in reading.splits):
        limit = reading.limit(split)
        count = counts[split] if limit is None else min(counts[split], limit)
        splits[split] = _draw_split(split, count, reading)
    return SegmentationData("streets", CLASSES, PALETTE, splits)


def _draw_split(split: str, count: int, reading: Reading) -> SegmentationSplit:
    images = torch.empty((count, *reading.size, 3), dtype=torch.uint8)
    labels = torch.empty((count, *reading.size), dtype=torch.uint8)

    def draw(index: int) -> None:
        image, label = street_scene(seed_of("street", split, index), reading.size)
        images[index], labels[index] = torch.from_numpy(image), torch.from_numpy(label.copy())

    each_of(draw, count, f"drawing streets {split}", reading.shown)
    own: Callable[[int], Tensor] = labels.__getitem__
    names = tuple(f"{split}_{index:04d}" for index in range(count))
    return SegmentationSplit(images, labels, names, own)
