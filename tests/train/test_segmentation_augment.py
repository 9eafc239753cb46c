import sys

import pytest
import torch
from torchvision_operators import torchvision_loads

from pyeff.train import segmentation_augment
from pyeff.train.batches import generator_of
from pyeff.train.segmentation_augment import (
    SegmentationBatches,
    augment_by_torchvision,
    augment_pairs,
    has_torchvision,
    to_input,
)
from pyeff.train.segmentation_data import IGNORE, SegmentationSplit


def pairs(count, height=9, width=12):
    """Labels say which pixel this is; the picture's first channel says the same."""
    labels = torch.arange(1, height * width + 1, dtype=torch.uint8).view(height, width)
    labels = labels.expand(count, -1, -1).contiguous()
    images = torch.stack([labels, labels.flip(1), labels.flip(2)], dim=3)
    return images, labels


def ours(images, labels, seed=0):
    return augment_pairs(images, labels, 2, generator_of(seed))


def theirs(images, labels, seed=0):
    return augment_by_torchvision(images, labels, 2, seed)


WAYS = [
    ours,
    pytest.param(
        theirs,
        marks=pytest.mark.skipif(not torchvision_loads(), reason="needs torchvision"),
    ),
]


@pytest.mark.parametrize("way", WAYS)
def test_pictures_and_labels_move_alike(way):
    images, labels = pairs(64)
    moved, seen = way(images, labels)
    assert moved.shape == images.shape
    assert seen.shape == labels.shape
    inside = seen != IGNORE
    assert torch.equal(moved[..., 0][inside], seen[inside])
    # What came into view is black and of no class, on every side.
    assert (moved[~inside] == 0).all()
    for side in (seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]):
        assert (side == IGNORE).all(1).any()
        assert (side != IGNORE).any(1).any()


@pytest.mark.parametrize("way", WAYS)
def test_moves_are_flips_and_up_to_two_pixels(way):
    images, labels = pairs(200)
    _, seen = way(images, labels)
    middle = seen[:, 4, 6].long() - 1
    rows, columns = middle // 12, middle % 12
    assert set((4 - rows).tolist()) == set(range(-2, 3))
    mirrored = seen[:, 4, 7] < seen[:, 4, 5]
    assert 60 < mirrored.sum() < 140
    assert set((6 - columns[~mirrored]).tolist()) == set(range(-2, 3))
    assert set((5 - columns[mirrored]).tolist()) == set(range(-2, 3))


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_decides_and_the_global_generator_does_not_move(way):
    images, labels = pairs(8)
    before = torch.get_rng_state()
    first, again, other = way(images, labels, 1), way(images, labels, 1), way(images, labels, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_a_missing_torchvision_is_named(monkeypatch):
    for name in ("torchvision", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"torchvision is needed .* pip install pyeff\[vision\]"):
        theirs(*pairs(1))


@pytest.fixture
def torchvision_of(monkeypatch, tmp_path):
    """Puts a package of that name in the way, as another build of it would be."""

    def install(source):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        loaded = [m for m in sys.modules if m.partition(".")[0] == "torchvision"]
        for name in loaded:
            monkeypatch.delitem(sys.modules, name)
        has_torchvision.cache_clear()

    yield install
    has_torchvision.cache_clear()


def test_a_torchvision_that_does_not_load_is_done_without(torchvision_of):
    torchvision_of("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.warns(UserWarning, match="does not load .*nms does not exist"):
        batches = SegmentationBatches(split(), 2, 0)
    assert not batches.by_torchvision
    assert batches.batch(0)[0].shape == (2, 3, 4, 5)


def test_which_way_is_chosen_once(monkeypatch):
    monkeypatch.setattr(segmentation_augment, "has_torchvision", lambda: False)
    batches = SegmentationBatches(split(), 2, 0)
    monkeypatch.setattr(segmentation_augment, "has_torchvision", lambda: True)
    x, y = batches.batch(1)
    again = SegmentationBatches(split(), 2, 0, by_torchvision=False).batch(1)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])


def split(count=5):
    images = torch.arange(count * 4 * 5 * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    labels = torch.arange(count, dtype=torch.uint8).view(count, 1, 1).expand(count, 4, 5)
    return SegmentationSplit(
        images.view(count, 4, 5, 3), labels, tuple("abcde"[:count]), lambda i: labels[i]
    )


def test_input_is_plain_pixels_channels_last():
    x = to_input(split().images)
    assert x.shape == (5, 3, 4, 5)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, 2, 0, 1] == torch.tensor(5) / 255


def test_an_epoch_sees_every_picture_once():
    batches = SegmentationBatches(split(), 2, 0, augmented=False)
    seen = torch.cat([batches.batch(step)[1][:, 0, 0] for step in range(5)])
    assert sorted(seen.tolist()) == sorted([0, 1, 2, 3, 4] * 2)
    x, y = SegmentationBatches(split(), 2, 0, augmented=False).batch(3)
    assert torch.equal(y, batches.batch(3)[1])
    assert torch.equal(x, to_input(split().images[y[:, 0, 0]]))
    assert y.dtype == torch.int64


def test_processes_share_the_batch_of_one():
    whole = SegmentationBatches(split(), 4, 7).batch(2)
    parts = [SegmentationBatches(split(), 4, 7, rank=r, ranks=2).batch(2) for r in range(2)]
    for place in range(2):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        SegmentationBatches(split(), 4, 7, ranks=3)
