import numpy as np
import torch

from pyeff.train.camvid import CLASSES
from pyeff.train.segmentation_data import IGNORE, Reading
from pyeff.train.street_scene import POLE, ROAD, SKY
from pyeff.train.streets import read_streets, street_scene


def test_a_scene_is_a_function_of_its_seed():
    image, label = street_scene(3, (48, 64))
    again = street_scene(3, (48, 64))
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (48, 64, 3)
    assert label.shape == (48, 64)
    assert (image == again[0]).all()
    assert (label == again[1]).all()
    assert (street_scene(4, (48, 64))[1] != label).any()


def test_sky_is_above_and_road_below():
    labels = np.stack([street_scene(seed, (48, 64))[1] for seed in range(12)])
    above, below = labels[:, :12], labels[:, -8:]
    assert (above == SKY).mean() > 3 * (labels[:, 30:] == SKY).mean()
    assert (above == ROAD).sum() == 0
    assert (below == ROAD).mean() > 0.5
    # Poles stand: over the columns that have one, it is taller than wide.
    poles = labels == POLE
    assert poles.any(1).sum() < poles.any(2).sum()


def test_classes_look_different():
    """Sky is brighter than road, trees are greener than both."""
    scenes = [street_scene(seed, (48, 64)) for seed in range(12)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)
    labels = np.concatenate([label.reshape(-1) for _, label in scenes])
    mean = {name: pixels[labels == c].mean(0) for c, name in enumerate(CLASSES)}
    assert mean["sky"].mean() > mean["road"].mean() + 40
    for other in ("sky", "road"):
        green = [mean[n][1] - mean[n][[0, 2]].mean() for n in ("tree", other)]
        assert green[0] > green[1] + 10


def test_every_class_occurs_in_the_data_set():
    data = read_streets(Reading((32, 40), limit_test=2), scenes=40)
    assert data.class_names == CLASSES
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 40,
        "val": 2,
        "test": 2,
    }
    train = data.split("train")
    assert set(train.labels.unique().tolist()) == set(range(11))
    assert IGNORE not in train.labels
    assert torch.equal(train.own_label(5), train.labels[5])
    # Splits do not share scenes, and fewer scenes are the first of many.
    assert not torch.equal(data.split("val").images[0], train.images[0])
    fewer = read_streets(Reading((32, 40), ("train",), limit_train=3)).split("train")
    assert torch.equal(fewer.images, train.images[:3])
