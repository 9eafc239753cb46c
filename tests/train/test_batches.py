import pytest
import torch

from pyeff.train import load_tasks
from pyeff.train.batches import BatchStream, augment, normalise, seed_of


@pytest.fixture(scope="module")
def digits():
    return load_tasks(["digits"], limit_train=50)[0]


def test_seed_is_the_same_everywhere():
    # Written down once: a change would break the resumption of every run there is.
    assert seed_of("order", 0, "digits", 1) == 3203814911701517018
    assert seed_of("order", 0, "digits", 2) != seed_of("order", 0, "digits", 1)


@pytest.mark.parametrize("flip", [False, True])
def test_augment_equals_crops_one_by_one(flip):
    images = torch.randint(1, 256, (7, 5, 6, 3), dtype=torch.uint8)  # H and W differ
    out = augment(images, 2, flip, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    top = torch.randint(0, 5, (7, 1), generator=generator)
    left = torch.randint(0, 5, (7, 1), generator=generator)
    mirrored = torch.randint(0, 2, (7, 1), generator=generator).bool()
    for i, image in enumerate(images):
        padded = torch.zeros(9, 10, 3, dtype=torch.uint8)
        padded[2:7, 2:8] = image
        crop = padded[top[i] : top[i] + 5, left[i] : left[i] + 6]
        expected = crop.flip(1) if flip and mirrored[i] else crop
        assert torch.equal(out[i], expected), i
    assert mirrored.any()
    assert not mirrored.all()


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 1.0, 0.3)
    out = normalise(images, mean, std)
    expected = (images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(out.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_image_once_a_round(digits):
    stream = BatchStream(digits, 20, seed=1)
    drawn = torch.cat([stream.indices(step) for step in range(5)])  # two rounds of 50
    assert drawn[:50].sort().values.tolist() == list(range(50))
    assert drawn[50:].sort().values.tolist() == list(range(50))
    assert drawn[:50].tolist() != drawn[50:].tolist()


def test_small_set_fills_a_large_batch(digits):
    # Places 360..479: the rest of round 7, all of round 8, some of round 9.
    counts = torch.bincount(BatchStream(digits, 120, seed=1).indices(3), minlength=50)
    assert int(counts.sum()) == 120
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= 3


def test_a_batch_depends_on_nothing_before_it(digits):
    first = BatchStream(digits, 20, seed=1)
    for step in range(7):
        first.batch(step)
    x, y = first.batch(7)
    again, labels = BatchStream(digits, 20, seed=1).batch(7)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert not torch.equal(x, BatchStream(digits, 20, seed=2).batch(7)[0])


def test_ranks_together_have_the_whole_batch(digits):
    whole, labels = BatchStream(digits, 20, seed=1).batch(4)
    parts = [BatchStream(digits, 20, seed=1, rank=r, ranks=2).batch(4) for r in range(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole)
    assert torch.equal(torch.cat([p[1] for p in parts]), labels)


def test_batch_must_divide_by_the_ranks(digits):
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 20"):
        BatchStream(digits, 20, seed=1, ranks=3)
