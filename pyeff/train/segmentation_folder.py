"""A plain folder of pictures and labels: the way in for data of one's own."""

import colorsys
from dataclasses import replace
from pathlib import Path

from pyeff.train.segmentation_data import (
    IGNORE,
    Colour,
    LabelFormat,
    Reading,
    SegmentationData,
    paired,
    pictures_of,
    read_split,
)

CLASSES_FILE = "classes.txt"


def read_segmentation_folder(data: Path | None, reading: Reading) -> SegmentationData:
    """Reads a data set of one's own.

    ::

        DATA/classes.txt           a class a line: its name, then its colour if it shall have one
        DATA/images/train/a.jpg    pictures, at any depth, in any common format
        DATA/labels/train/a.png    of the same path: one channel, a pixel is the number of its class
        DATA/images/val/...        val or test, or both

    The first line of ``classes.txt`` is class 0, for example ``road 128 64 128``; empty lines and
    those that begin with ``#`` are skipped. A pixel of 255 is ignored.

    Args:
        data: the folder.
        reading: at which size, and how many.

    Returns:
        The data. Where there is no ``val``, ``test`` stands for it too.

    Raises:
        ValueError: a folder or file is missing or broken; names the path.
        ImportError: pillow is missing.
    """
    if data is None:
        raise ValueError("folder: data must name the folder of the data set, got none")
    names, palette = read_classes(data / CLASSES_FILE)
    labels = LabelFormat({**{c: c for c in range(len(names))}, IGNORE: IGNORE}, "folder")
    pictures, folder = data / "images", data / "labels"
    found = [name for name in ("train", "val", "test") if (pictures / name).is_dir()]
    if "train" not in found or len(found) == 1:
        raise ValueError(
            f"folder: {pictures} must hold the folders train and val (or test), got "
            f"{found or 'none'}"
        )
    if "val" not in found and "val" in reading.splits:
        reading = replace(reading, splits=(*reading.splits, "test"))
    splits = {}
    for split in (name for name in found if name in reading.splits):
        pairs = paired(
            pictures_of(pictures / split, "folder"),
            lambda picture: folder / picture.relative_to(pictures).with_suffix(".png"),
            "folder",
        )
        splits[split] = read_split(split, pairs, labels, reading)
    if "val" in reading.splits:
        splits.setdefault("val", splits[found[-1]])
    return SegmentationData(data.name, names, palette, splits)


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours of the classes.

    Args:
        path: of the file; see :func:`read_segmentation_folder`.

    Returns:
        A name and a colour a class; classes without a colour get distinct ones.

    Raises:
        ValueError: there is no such file, or no class in it, or too many.
    """
    if not path.is_file():
        raise ValueError(f"folder: {path} must list the classes, one a line, got no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not 1 <= len(lines) <= IGNORE:
        raise ValueError(
            f"folder: {path} must list between 1 and {IGNORE} classes, got {len(lines)}"
        )
    entries = [_entry(line, number, path) for number, line in enumerate(lines)]
    return tuple(name for name, _ in entries), tuple(colour for _, colour in entries)


def _entry(line: str, number: int, path: Path) -> tuple[str, Colour]:
    words = line.split()
    last = words[-3:]
    if len(words) < 4 or not all(word.isdecimal() for word in last):
        return line, _distinct(number)
    red, green, blue = map(int, last)
    if max(red, green, blue) > 255:
        raise ValueError(f"folder: {path} must hold colours of 0..255, got {line!r}")
    return " ".join(words[:-3]), (red, green, blue)


def _distinct(number: int) -> Colour:
    """A colour for a class: hues a golden angle apart never come close together."""
    rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.55 + 0.15 * (number % 3), 0.9)
    red, green, blue = (round(255 * value) for value in rgb)
    return red, green, blue
