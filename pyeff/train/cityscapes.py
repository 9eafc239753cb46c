"""Cityscapes' fine annotations, 19 classes, in the layout that it is published in."""

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

# Name, the published label id, colour; the place in this row is the train id.
_CLASSES: tuple[tuple[str, int, Colour], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
# Every id from "unlabeled" to "bicycle", of which 19 are evaluated.
LABEL_IDS = {i: IGNORE for i in range(34)} | {
    label_id: train_id for train_id, (_, label_id, _) in enumerate(_CLASSES)
}
_SPLITS: tuple[str, ...] = ("train", "val")
_PICTURES, _LABELS = "leftImg8bit", "gtFine"


def read_cityscapes(data: Path | None, reading: Reading) -> SegmentationData:
    """Reads Cityscapes' 2,975 training and 500 validation pictures of 1024 x 2048.

    Expects ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png`` and
    ``gtFine/{train,val}/CITY/*_gtFine_labelIds.png``. The labels of its test split are not
    published, so ``val`` is what results are reported on.

    Args:
        data: the folder that holds ``leftImg8bit`` and ``gtFine``.
        reading: at which size, and how many; all of them at 512 x 1024 take 7 GB of memory.

    Returns:
        The data, up to two splits.

    Raises:
        ValueError: a folder or file is missing or broken; names the path.
        ImportError: pillow is missing.

    Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding",
        CVPR 2016.
    """
    if data is None:
        raise ValueError(
            f"cityscapes: data must name the folder that holds {_PICTURES} and {_LABELS}, got none"
        )
    missing = [name for name in (_PICTURES, _LABELS) if not (data / name).is_dir()]
    if missing:
        raise ValueError(
            f"cityscapes: {data} must hold the folders {_PICTURES} and {_LABELS}, got no {missing}"
        )
    labels = LabelFormat(LABEL_IDS, "cityscapes")
    splits = {}
    for split in (name for name in _SPLITS if name in reading.splits):
        pictures = pictures_of(data / _PICTURES / split, "cityscapes")
        pairs = paired(pictures, lambda picture: _label_of(picture, data), "cityscapes")
        splits[split] = read_split(split, pairs, labels, reading)
    return SegmentationData(
        "cityscapes",
        tuple(name for name, _, _ in _CLASSES),
        tuple(colour for _, _, colour in _CLASSES),
        splits,
    )


def _label_of(picture: Path, data: Path) -> Path:
    folder = data / _LABELS / picture.parent.relative_to(data / _PICTURES)
    return folder / f"{picture.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"
