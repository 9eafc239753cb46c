"""CamVid, 11 classes, in the layout that it is commonly published in for segmentation."""

from functools import partial
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

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE: tuple[Colour, ...] = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (0, 0, 192),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
_FOLDER = "CamVid"
_VOID = len(CLASSES)
_SPLITS = ("train", "val", "test")


def read_camvid(data: Path | None, reading: Reading) -> SegmentationData:
    """Reads CamVid's 367 / 101 / 233 frames of 360 x 480.

    Expects ``train``, ``val`` and ``test`` with pictures and ``trainannot``, ``valannot`` and
    ``testannot`` with labels of the same names, whose pixels are 0..10, or 11 for void.

    Args:
        data: the folder that holds ``CamVid``, or that folder itself.
        reading: at which size, and how many.

    Returns:
        The data, up to three splits.

    Raises:
        ValueError: a folder or file is missing or broken; names the path.
        ImportError: pillow is missing.

    Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", 2009; classes and
        splits: Badrinarayanan, Kendall, Cipolla, "SegNet", 2017.
    """
    if data is None:
        raise ValueError(f"camvid: data must name the folder that holds {_FOLDER}, got none")
    root = data if (data / "val").is_dir() or data.name == _FOLDER else data / _FOLDER
    chosen = [split for split in _SPLITS if split in reading.splits]
    wanted = [f"{split}{kind}" for split in chosen for kind in ("", "annot")]
    missing = [name for name in wanted if not (root / name).is_dir()]
    if missing:
        raise ValueError(f"camvid: {root} must hold the folders {wanted}, got no {missing}")
    labels = LabelFormat({**{c: c for c in range(_VOID)}, _VOID: IGNORE}, "camvid")
    splits = {}
    for split in chosen:
        pairs = paired(
            pictures_of(root / split, "camvid"),
            partial(_label_of, root / f"{split}annot"),
            "camvid",
        )
        splits[split] = read_split(split, pairs, labels, reading)
    return SegmentationData("camvid", CLASSES, PALETTE, splits)


def _label_of(folder: Path, picture: Path) -> Path:
    return folder / f"{picture.stem}.png"
