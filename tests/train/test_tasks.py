import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from pyeff.train import load_tasks
from pyeff.train.tasks import parse_spec


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))


def pictures(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


@pytest.fixture
def cifar(tmp_path):
    for split, n in (("train", 6), ("test", 4)):
        labels = {
            "fine_labels": [i % 3 for i in range(n)],
            "coarse_labels": [i % 2 for i in range(n)],
        }
        write(tmp_path / "cifar-100-python" / split, {"data": pictures(n, n), **labels})
    names = {"fine_label_names": ["a", "b", "c"], "coarse_label_names": ["x", "y"]}
    write(tmp_path / "cifar-100-python" / "meta", names)
    for name, n in (("data_batch_1", 3), ("data_batch_3", 2), ("test_batch", 4)):
        content = {"data": pictures(n, n), "labels": [i % 2 for i in range(n)]}
        write(tmp_path / "cifar-10-batches-py" / name, content)
    write(tmp_path / "cifar-10-batches-py" / "batches.meta", {"label_names": ["u", "v"]})
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("cifar100:fine", ("cifar100:fine", "cifar100", "fine")),
        ("cifar10", ("cifar10", "cifar10", "")),
        ("digits", ("digits", "digits", "")),
        ("odd=digits:parity", ("odd", "digits", "parity")),
        ("birds=pictures/birds", ("birds", "folder", "pictures/birds")),
        ("folder:pictures/birds", ("birds", "folder", "pictures/birds")),
    ],
)
def test_spec(spec, parsed):
    assert parse_spec(spec) == parsed


@pytest.mark.parametrize("spec", ["cifar100", "cifar100:medium", "mnist", "digits:colour", "", "="])
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=r"tasks: .* must be one of"):
        parse_spec(spec)


def test_cifar100_tasks_share_their_images(cifar):
    fine, coarse = load_tasks(["cifar100:fine", "cifar100:coarse"], cifar)
    assert fine.train_images.data_ptr() == coarse.train_images.data_ptr()
    assert fine.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert coarse.test_labels.tolist() == [0, 1, 0, 1]
    assert (fine.classes, coarse.class_names) == (3, ("x", "y"))
    assert fine.image_shape == (3, 32, 32)
    planes = pictures(6, 6).reshape(6, 3, 32, 32)
    assert np.array_equal(fine.train_images.permute(0, 3, 1, 2).numpy(), planes)
    np.testing.assert_allclose(fine.mean, planes.mean((0, 2, 3)) / 255, rtol=1e-9)
    np.testing.assert_allclose(fine.std, planes.std((0, 2, 3)) / 255, rtol=1e-9)


def test_cifar10_reads_the_batches_that_are_there(cifar):
    (task,) = load_tasks(["cifar10"], cifar / "cifar-10-batches-py")
    assert len(task.train_labels) == 5
    assert task.train_labels.tolist() == [0, 1, 0, 0, 1]
    assert len(task.test_images) == 4


def test_limits(cifar):
    (task,) = load_tasks(["cifar10"], cifar, limit_train=2, limit_test=1)
    assert (len(task.train_images), len(task.test_labels)) == (2, 1)


def test_missing_folder_says_what_was_found(tmp_path):
    (tmp_path / "holidays").mkdir()
    with pytest.raises(ValueError, match=r"cifar-100-python must hold.*train.*holidays"):
        load_tasks(["cifar100:fine"], tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_tasks(["cifar10"], tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must name the folder"):
        load_tasks(["cifar10"])


def test_missing_file_says_what_was_found(cifar):
    (cifar / "cifar-100-python" / "test").unlink()
    with pytest.raises(ValueError, match=r"must hold the files.*got a folder that holds.*meta"):
        load_tasks(["cifar100:fine"], cifar)
    for batch in (cifar / "cifar-10-batches-py").glob("data_batch_*"):
        batch.unlink()
    with pytest.raises(ValueError, match="must hold data_batch_1"):
        load_tasks(["cifar10"], cifar)


def test_broken_file(cifar):
    path = cifar / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="train must be a CIFAR python file"):
        load_tasks(["cifar100:fine"], cifar)
    write(path, {"data": pictures(6, 6)[:, :100], "fine_labels": [0] * 6})
    with pytest.raises(ValueError, match=r"must hold uint8 images \[N, 3072\]"):
        load_tasks(["cifar100:fine"], cifar)
    write(path, {"data": pictures(6, 6), "fine_labels": [7] * 6})
    with pytest.raises(ValueError, match=r"must hold fine_labels in 0..2, got 7..7"):
        load_tasks(["cifar100:fine"], cifar)
    write(path, {"data": pictures(6, 6)})
    with pytest.raises(ValueError, match="must hold 'fine_labels'"):
        load_tasks(["cifar100:fine"], cifar)


class Harmful:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_pickle_cannot_run_code(cifar):
    write(cifar / "cifar-100-python" / "meta", {"fine_label_names": Harmful()})
    with pytest.raises(ValueError, match="eval is not part of a CIFAR file"):
        load_tasks(["cifar100:fine"], cifar)


def test_digits():
    whole, parity = load_tasks(["digits", "digits:parity"])
    assert whole.image_shape == (1, 8, 8)
    assert (len(whole.train_labels), len(whole.test_labels)) == (1437, 360)
    assert torch.equal(whole.train_labels % 2, parity.train_labels)
    assert int(whole.train_images.max()) == 240
    assert not whole.flip


def folder(root, sizes):
    for split in ("train", "val"):
        for index, (name, size) in enumerate(sizes.items()):
            path = root / split / name
            path.mkdir(parents=True)
            Image.new("RGB", size, (40 * index, 0, 255)).save(path / "one.png")


def test_image_folder(tmp_path):
    folder(tmp_path / "set", {"cat": (6, 5), "dog": (6, 5)})
    (task,) = load_tasks(["pets=set"], tmp_path)
    assert (task.name, task.class_names, task.image_shape) == ("pets", ("cat", "dog"), (3, 5, 6))
    assert task.train_images[1, 0, 0].tolist() == [40, 0, 255]
    assert task.train_labels.tolist() == [0, 1]


def test_mixed_sizes_need_an_image_size(tmp_path):
    folder(tmp_path, {"cat": (6, 5), "dog": (9, 12)})
    with pytest.raises(ValueError, match="must share one size"):
        load_tasks([f"pets={tmp_path}"])
    (task,) = load_tasks([f"pets={tmp_path}"], image_size=4)
    assert task.image_shape == (3, 4, 4)


def test_broken_image_folder(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with train and val"):
        load_tasks(["pets=nowhere"], tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must hold the folders train and val.*got \['train'\]"):
        load_tasks([f"pets={tmp_path}"])
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold images"):
        load_tasks([f"pets={tmp_path}"])
    (tmp_path / "train" / "cat" / "one.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"one.png must be an image"):
        load_tasks([f"pets={tmp_path}"])
    (tmp_path / "val" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must have classes of .* got also \['dog'\]"):
        load_tasks([f"pets={tmp_path}"])


def characters(root, sizes=(3, 4), classes=("0", "1", "A")):
    """A tree as chars74k's: so many images of each class to learn from and to test on."""
    for split, count in zip(("train", "test"), sizes, strict=True):
        for label, name in enumerate(classes):
            path = root / "chars74k" / split / name
            path.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (8, 8), (100 * label, k, 0)).save(path / f"{k:05d}.png")


def test_chars74k_in_colour_and_grey(tmp_path):
    characters(tmp_path)
    (task,) = load_tasks(["chars74k"], tmp_path)
    assert (task.name, task.class_names) == ("chars74k", ("0", "1", "A"))
    assert (task.image_shape, task.pad, task.flip) == ((3, 8, 8), 4, False)
    assert task.train_labels.bincount().tolist() == [3, 3, 3]
    assert task.test_labels.bincount().tolist() == [4, 4, 4]
    # An image goes with its own label, and a prefix is no single class.
    assert torch.equal(task.train_images[:, 0, 0, 0].long(), 100 * task.train_labels)
    assert len(set(load_tasks(["chars74k"], tmp_path, limit_train=6)[0].train_labels.tolist())) > 1
    (grey,) = load_tasks(["letters=chars74k:grey"], tmp_path, image_size=6)
    assert (grey.name, grey.image_shape) == ("letters", (1, 6, 6))
    # 0.299 R + 0.587 G + 0.114 B, with G below 3.
    luma = (29.9 * grey.train_labels).round()
    assert bool(((grey.train_images[:, 0, 0, 0].double() - luma).abs() <= 2).all())


def test_chars74k_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="chars74k: data must name the folder that holds chars74k"):
        load_tasks(["chars74k"])
    with pytest.raises(ValueError, match="chars74k must be a folder with train and val"):
        load_tasks(["chars74k"], tmp_path)
    with pytest.raises(ValueError, match="chars74k must be one of chars74k:grey, got 'chars74k:x'"):
        load_tasks(["chars74k:x"], tmp_path)


def test_grey_becomes_colour_beside_colour(cifar):
    grey, colour = load_tasks(["digits", "cifar10"], cifar)
    assert grey.image_shape == (3, 8, 8)
    assert colour.image_shape == (3, 32, 32)
    assert len(grey.mean) == 3
    assert torch.equal(grey.train_images[..., 0], grey.train_images[..., 2])


def test_names_must_differ():
    with pytest.raises(ValueError, match="names must differ, got 'digits' twice"):
        load_tasks(["digits", "digits"])
    with pytest.raises(ValueError, match="must name at least one task"):
        load_tasks([])
