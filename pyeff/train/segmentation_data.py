"""Pictures with a class for every pixel: in memory at one size, decoded once."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyeff._extras import require
from pyeff.train.progress_bar import progress_bar

# The label of a pixel that belongs to no class: it teaches nothing and is not counted.
IGNORE = 255
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_UNKNOWN = -1
_PURPOSE = "to read pictures"

Colour = tuple[int, int, int]
Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Reading:
    """How a data set is read.

    Attributes:
        size: ``(H, W)`` to which pictures and labels are scaled.
        splits: the ones to read, of those that are there.
        limit_train: at most so many training pictures, evenly spread.
        limit_test: at most so many in each other split.
        shown: a progress bar, on a terminal.
    """

    size: tuple[int, int]
    splits: tuple[str, ...] = ("train", "val", "test")
    limit_train: int | None = None
    limit_test: int | None = None
    shown: bool = False

    def limit(self, split: str) -> int | None:
        """At most how many pictures of a split are wanted."""
        return self.limit_train if split == "train" else self.limit_test


@dataclass(frozen=True)
class SegmentationSplit:
    """Pictures of one split, at the size of the run, and their labels.

    Attributes:
        images: uint8 ``[N, H, W, 3]``.
        labels: uint8 ``[N, H, W]``: a class, or 255 for none.
        names: one a picture.
        own_label: index to the label at the size that it was published in, uint8 ``[H', W']``.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    own_label: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class SegmentationData:
    """A data set for segmentation.

    Attributes:
        name: of the data set.
        class_names: one a class.
        palette: a colour (red, green, blue) a class.
        splits: ``train``, ``val`` and, where there is one, ``test``.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Colour, ...]
    splits: Mapping[str, SegmentationSplit]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def held_out(self) -> str:
        """The split that results are reported on: ``test``, or ``val`` where there is none."""
        return "test" if "test" in self.splits else "val"

    def split(self, name: str) -> SegmentationSplit:
        """One split.

        Raises:
            ValueError: the data set has no such split.
        """
        if name not in self.splits:
            # Where another one was asked for alone, none was read.
            known = ", ".join(self.splits) or f"train, val and test, if {self.name} has it"
            raise ValueError(f"segmentation: split must be one of {known}, got {name!r}")
        return self.splits[name]

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps, to name and colour classes without the data (JSON-able)."""
        return {
            "dataset": self.name,
            "class_names": list(self.class_names),
            "palette": [list(colour) for colour in self.palette],
        }


@dataclass(frozen=True)
class LabelFormat:
    """How the values of a label picture become classes.

    Attributes:
        classes: value to class; 255 for a value that is to be ignored.
        what: the data set, for messages.
    """

    classes: Mapping[int, int]
    what: str

    def read(self, path: Path) -> np.ndarray:
        """The classes of a label picture, uint8 ``[H, W]``.

        Raises:
            ValueError: the file is no picture, has several channels, or holds an unknown value.
            ImportError: pillow is missing.
        """
        pillow = require("PIL.Image", "train", _PURPOSE)
        try:
            with pillow.open(path) as file:
                mode, values = file.mode, np.asarray(file)
        except Exception as error:
            # Decoders raise whatever they meet.
            raise ValueError(f"{self.what}: {path} must be a picture, got {error}") from error
        if mode not in ("L", "P") or values.ndim != 2:
            raise ValueError(
                f"{self.what}: {path} must be a picture of one channel with class numbers, got "
                f"mode {mode}"
            )
        table = np.full(256, _UNKNOWN, dtype=np.int16)
        for value, label in self.classes.items():
            table[value] = label
        found = table[values]
        if (found == _UNKNOWN).any():
            strange = sorted({int(v) for v in np.unique(values[found == _UNKNOWN])})
            raise ValueError(
                f"{self.what}: {path} must hold the values {_shown(self.classes)}, got {strange}"
            )
        return found.astype(np.uint8)


def _shown(values: Mapping[int, int]) -> str:
    ordered = sorted(values)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}..{ordered[-1]}"
    return ", ".join(map(str, ordered))


def read_picture(path: Path, what: str = "segmentation", *, upright: bool = False) -> np.ndarray:
    """A picture as RGB, uint8 ``[H, W, 3]``.

    Args:
        path: the file.
        what: the data set or command, for messages.
        upright: turn it as the camera says that it shall be seen. Labels know nothing of that.

    Raises:
        ValueError: the file is no picture, or a grey one of more than 8 bits; names it.
        ImportError: pillow is missing.
    """
    pillow = require("PIL.Image", "train", _PURPOSE)
    operations = require("PIL.ImageOps", "train", _PURPOSE)
    try:
        with pillow.open(path) as file:
            mode = file.mode
            shown = operations.exif_transpose(file) if upright else file
            values = np.asarray(shown.convert("RGB"))
    except Exception as error:
        # Decoders raise whatever they meet.
        raise ValueError(f"{what}: {path} must be a picture, got {error}") from error
    # The conversion cuts off what is above 255.
    if mode.startswith(("I", "F")):
        raise ValueError(f"{what}: {path} must have 8 bits a channel, got mode {mode}")
    return values


def resized(values: np.ndarray, size: tuple[int, int], *, label: bool = False) -> np.ndarray:
    """A picture at another size: bilinear over all covered pixels, labels the nearest one.

    Args:
        values: uint8 ``[H, W, 3]``, or ``[H, W]`` for labels.
        size: ``(H', W')``.
        label: take the nearest pixel.

    Returns:
        uint8 ``[H', W', 3]`` or ``[H', W']``.

    Raises:
        ImportError: pillow is missing.
    """
    if values.shape[:2] == size:
        return values
    pillow = require("PIL.Image", "train", _PURPOSE)
    way = pillow.Resampling.NEAREST if label else pillow.Resampling.BILINEAR
    return np.asarray(pillow.fromarray(values).resize((size[1], size[0]), way))


def read_split(
    split: str, pairs: Sequence[Pair], labels: LabelFormat, reading: Reading
) -> SegmentationSplit:
    """Reads pictures and labels into memory, several at a time.

    Args:
        split: its name.
        pairs: files of picture and label.
        labels: how to read the latter.
        reading: at which size, and how many.

    Returns:
        The split, in the order of ``pairs``.

    Raises:
        ValueError: there are none, a file is broken, or a picture and its label differ in size.
        ImportError: pillow is missing.
    """
    limit, size = reading.limit(split), reading.size
    if limit is not None and limit < len(pairs):
        # Frames of a video follow each other: the first ones would all show the same street.
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    if not pairs:
        raise ValueError(f"{labels.what}: a split must hold pictures with labels, got none")
    images = torch.empty((len(pairs), *size, 3), dtype=torch.uint8)
    classes = torch.empty((len(pairs), *size), dtype=torch.uint8)

    def read(index: int) -> None:
        picture, label = pairs[index]
        image, own = read_picture(picture, labels.what), labels.read(label)
        if image.shape[:2] != own.shape:
            raise ValueError(
                f"{labels.what}: {label} must be as large as {picture} ({list(image.shape[:2])}), "
                f"got {list(own.shape)}"
            )
        images[index] = torch.from_numpy(resized(image, size).copy())
        classes[index] = torch.from_numpy(resized(own, size, label=True).copy())

    each_of(read, len(pairs), f"reading {labels.what} {split}", reading.shown)
    return SegmentationSplit(
        images,
        classes,
        tuple(picture.stem for picture, _ in pairs),
        partial(_own_label, tuple(label for _, label in pairs), labels),
    )


def _own_label(paths: Sequence[Path], labels: LabelFormat, index: int) -> Tensor:
    return torch.from_numpy(labels.read(paths[index]))


def each_of(work: Callable[[int], None], count: int, text: str, shown: bool) -> None:
    """Calls ``work(0)`` to ``work(count - 1)`` in some threads, with a progress bar."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, progress_bar(count, 0, shown) as bar:
        try:
            for _ in pool.map(work, range(count)):
                bar.advance(text)
        except BaseException:
            # What nobody waits for any more would be read to the end first.
            pool.shutdown(cancel_futures=True)
            raise


def pictures_of(folder: Path, what: str) -> list[Path]:
    """The pictures in a folder, at any depth, sorted by path.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} must be a folder of pictures, got none")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{what}: {folder} must hold pictures ({sorted(SUFFIXES)}), got none")
    return found


def paired(pictures: Sequence[Path], label_of: Callable[[Path], Path], what: str) -> list[Pair]:
    """Each picture with its label's file.

    Raises:
        ValueError: a label is missing; names it.
    """
    pairs = [(picture, label_of(picture)) for picture in pictures]
    for picture, label in pairs:
        if not label.is_file():
            raise ValueError(f"{what}: {picture} must have its label at {label}, got none")
    return pairs
