"""The smallest run for segmentation, and the smallest data sets on disk."""

import numpy as np
from PIL import Image

from pyeff.train.segmentation_config import SegmentationConfig

MODEL = {"family": "erfnet", "widths": [4, 8, 12]}
SIZE = (16, 24)


def segmentation_config(out, **changes):
    settings = {
        "out": str(out),
        "model": MODEL,
        "size": SIZE,
        "scenes": 6,
        "limit_test": 3,
        "stage1_epochs": 1,
        "epochs": 2,
        "batch_size": 4,
        "device": "cpu",
    }
    return SegmentationConfig(**{**settings, **changes})


def write_picture(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def random_pair(seed, size, values):
    """A picture and labels out of some values."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return image, rng.choice(np.array(values, dtype=np.uint8), size)


def camvid_tree(root, size=(12, 16), counts=(3, 2, 2)):
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for index in range(count):
            image, label = random_pair(index + 10 * count, size, range(12))
            write_picture(root / "CamVid" / split / f"f{index}.png", image)
            write_picture(root / "CamVid" / f"{split}annot" / f"f{index}.png", label)
    return root


def folder_tree(root, splits=("train", "val"), size=(20, 24)):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(
        "# name, colour\nroad 128 64 128\n\ntraffic sign\ncar 0 0 9\n"
    )
    for number, split in enumerate(splits):
        for index in range(3):
            image, label = random_pair(index + 10 * number, size, (0, 1, 2, 255))
            write_picture(root / "images" / split / "day" / f"{index}.jpg", image)
            write_picture(root / "labels" / split / "day" / f"{index}.png", label)
    return root
