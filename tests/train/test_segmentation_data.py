import numpy as np
import pytest
import torch
from PIL import Image
from train.segmentation_tiny import camvid_tree, folder_tree, random_pair, write_picture

from pyeff.train.camvid import read_camvid
from pyeff.train.cityscapes import read_cityscapes
from pyeff.train.segmentation_data import IGNORE, Reading, read_picture
from pyeff.train.segmentation_folder import read_classes, read_segmentation_folder


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path)))


def cityscapes_tree(root):
    for split, cities in (("train", ("ulm", "jena")), ("val", ("lindau",))):
        for city in cities:
            stem = f"{city}_000000_000019"
            image, label = random_pair(1, (8, 16), range(34))
            write_picture(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image)
            write_picture(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", label)
    return root


def test_camvid_at_its_own_size(tmp_path):
    data = read_camvid(camvid_tree(tmp_path), Reading((12, 16)))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 3,
        "val": 2,
        "test": 2,
    }
    assert (data.classes, len(data.palette), data.held_out) == (11, 11, "test")
    train = data.split("train")
    assert train.names == ("f0", "f1", "f2")
    root = tmp_path / "CamVid"
    assert torch.equal(train.images[1], pixels(root / "train" / "f1.png"))
    published = pixels(root / "trainannot" / "f1.png")
    expected = torch.where(published == 11, IGNORE, published)
    assert torch.equal(train.labels[1], expected)
    assert torch.equal(train.own_label(1), expected)


def test_camvid_scaled_keeps_its_own_labels(tmp_path):
    camvid_tree(tmp_path)
    for data in (tmp_path, tmp_path / "CamVid"):
        test = read_camvid(data, Reading((6, 8), ("test",))).split("test")
        assert test.images.shape == (2, 6, 8, 3)
        assert test.own_label(0).shape == (12, 16)
        # Nearest, so that no class is made up.
        assert set(test.labels.unique().tolist()) <= set(test.own_label(0).unique().tolist()) | set(
            test.own_label(1).unique().tolist()
        )


def test_limits_spread_evenly(tmp_path):
    camvid_tree(tmp_path, counts=(4, 2, 2))
    data = read_camvid(tmp_path, Reading((12, 16), limit_train=2, limit_test=1))
    assert data.split("train").names == ("f0", "f2")
    assert len(data.split("val")) == len(data.split("test")) == 1


def test_cityscapes_as_published(tmp_path):
    data = read_cityscapes(cityscapes_tree(tmp_path), Reading((8, 16)))
    assert (data.classes, data.held_out) == (19, "val")
    train = data.split("train")
    assert train.names == ("jena_000000_000019_leftImg8bit", "ulm_000000_000019_leftImg8bit")
    published = pixels(
        tmp_path / "gtFine" / "train" / "jena" / "jena_000000_000019_gtFine_labelIds.png"
    )
    # Road, building, pole, sky, car and bicycle; licence plates and void are ignored.
    for label_id, train_id in {7: 0, 11: 2, 17: 5, 23: 10, 26: 13, 33: 18, 0: 255, 10: 255}.items():
        assert (train.labels[0][published == label_id] == train_id).all()
    assert set(train.labels.unique().tolist()) <= {*range(19), IGNORE}
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        data.split("test")


def test_a_folder_of_ones_own(tmp_path):
    data = read_segmentation_folder(folder_tree(tmp_path / "mine"), Reading((20, 24)))
    assert data.name == "mine"
    assert data.class_names == ("road", "traffic sign", "car")
    assert data.palette[0] == (128, 64, 128)
    assert data.palette[2] == (0, 0, 9)
    assert data.palette[1] not in (data.palette[0], data.palette[2])
    assert len(data.split("train")) == 3
    published = pixels(tmp_path / "mine" / "labels" / "val" / "day" / "2.png")
    assert torch.equal(data.split("val").labels[2], published)


def test_a_folder_with_test_alone_uses_it_as_val(tmp_path):
    folder_tree(tmp_path, ("train", "test"))
    data = read_segmentation_folder(tmp_path, Reading((20, 24)))
    assert data.split("val") is data.split("test")
    assert data.held_out == "test"
    only = read_segmentation_folder(tmp_path, Reading((20, 24), ("val",)))
    assert torch.equal(only.split("val").labels, data.split("test").labels)


def remove(root, name):
    for path in sorted((root / name).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / name).rmdir()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda r: remove(r, "CamVid/valannot"), r"must hold the folders .* got no \['valannot'\]"),
        (lambda r: (r / "CamVid/testannot/f0.png").unlink(), r"must have its label at .*f0\.png"),
        (lambda r: (r / "CamVid/train/f0.png").write_bytes(b"x"), r"f0\.png must be a picture"),
        (lambda r: (r / "CamVid/trainannot/f1.png").write_bytes(b"x"), r"f1\.png must be a pict"),
        (
            lambda r: write_picture(
                r / "CamVid/trainannot/f1.png", np.full((12, 16), 12, dtype=np.uint8)
            ),
            r"f1\.png must hold the values 0\.\.11, got \[12\]",
        ),
        (
            lambda r: write_picture(
                r / "CamVid/trainannot/f1.png", np.zeros((12, 16, 3), dtype=np.uint8)
            ),
            r"f1\.png must be a picture of one channel with class numbers, got mode RGB",
        ),
        (
            lambda r: write_picture(
                r / "CamVid/trainannot/f1.png", np.zeros((12, 15), dtype=np.uint8)
            ),
            r"f1\.png must be as large as .*f1\.png \(\[12, 16\]\), got \[12, 15\]",
        ),
        (lambda r: [p.unlink() for p in (r / "CamVid/val").iterdir()], "val must hold pictures"),
    ],
)
def test_damaged_camvid(tmp_path, damage, error):
    damage(camvid_tree(tmp_path))
    with pytest.raises(ValueError, match=error):
        read_camvid(tmp_path, Reading((12, 16)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32], ids=str)
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 5), 300, dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif must have 8 bits a channel, got mode [IF]"):
        read_picture(tmp_path / "a.tif")


def test_missing_data(tmp_path):
    for read in (read_camvid, read_cityscapes, read_segmentation_folder):
        with pytest.raises(ValueError, match=r"data must name the folder .* got none"):
            read(None, Reading((8, 8)))
    with pytest.raises(ValueError, match=r"got no \['leftImg8bit', 'gtFine'\]"):
        read_cityscapes(tmp_path, Reading((8, 8)))
    with pytest.raises(ValueError, match=r"classes\.txt must list the classes"):
        read_segmentation_folder(tmp_path, Reading((8, 8)))
    folder_tree(tmp_path, ("train",))
    with pytest.raises(ValueError, match=r"folders train and val \(or test\), got \['train'\]"):
        read_segmentation_folder(tmp_path, Reading((8, 8)))


def test_unusable_class_lists(tmp_path):
    (tmp_path / "classes.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="must list between 1 and 255 classes, got 0"):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("road 0 0 256\n")
    with pytest.raises(ValueError, match=r"colours of 0\.\.255, got 'road 0 0 256'"):
        read_classes(tmp_path / "classes.txt")
