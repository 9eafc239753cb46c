import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from train.segmentation_tiny import segmentation_config, write_picture
from train.tiny import tiny_config

from pyeff.train import Trainer, progress_bar
from pyeff.train.segmentation_data import IGNORE
from pyeff.train.segmentation_overlay import coloured, label_png, overlay, png
from pyeff.train.segmentation_predict import Segmenter, gather, predict_files
from pyeff.train.segmentation_trainer import SegmentationTrainer

PALETTE = ((10, 20, 30), (200, 100, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    SegmentationTrainer(segmentation_config(out, stage1_epochs=0, epochs=1)).fit()
    return str(out)


def picture(seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_colours_of_labels():
    labels = np.array([[0, 1, IGNORE]], dtype=np.uint8)
    assert coloured(labels, PALETTE).tolist() == [[[10, 20, 30], [200, 100, 0], [0, 0, 0]]]


def test_overlay_mixes_and_leaves_ignored_pixels():
    labels = np.array([[0, 1, IGNORE]], dtype=np.uint8)
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    mixed = overlay(image, labels, PALETTE, 0.25)
    assert mixed.tolist() == [[[78, 80, 83], [125, 100, 75], [100, 100, 100]]]
    assert (overlay(image, labels, PALETTE, 0.0) == image).all()
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\], got 1.5"):
        overlay(image, labels, PALETTE, 1.5)
    with pytest.raises(ValueError, match=r"as large as the image \[1, 3\], got \[3, 1\]"):
        overlay(image, labels.T, PALETTE)


def test_label_pictures_hold_numbers_and_show_colours():
    labels = np.random.default_rng(0).choice(np.array([0, 1, IGNORE], dtype=np.uint8), (7, 5))
    read = Image.open(io.BytesIO(label_png(labels, PALETTE)))
    assert read.mode == "P"
    assert (np.asarray(read) == labels).all()
    assert (np.asarray(read.convert("RGB")) == coloured(labels, PALETTE)).all()
    image = picture()
    assert (np.asarray(Image.open(io.BytesIO(png(image)))) == image).all()


def test_labels_have_the_picture_s_size(run):
    segmenter = Segmenter(run)
    assert segmenter.size == (16, 24)
    assert segmenter.class_names[0] == "sky"
    labels = segmenter.label(picture())
    assert labels.shape == (20, 30)
    assert labels.dtype == np.uint8
    assert labels.max() < 11
    # At its own size nothing is scaled; the network sees other pixels.
    assert Segmenter(run, own_size=True).label(picture(size=(17, 19))).shape == (17, 19)
    assert Segmenter(run, size=(24, 40)).size == (24, 40)
    half = Segmenter(run, precision="bf16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert (half.label(picture()) == labels).mean() > 0.7


def test_files_and_what_is_in_them(run, tmp_path):
    write_picture(tmp_path / "in" / "a.png", picture(0))
    write_picture(tmp_path / "in" / "deep" / "b.jpg", picture(1))
    write_picture(tmp_path / "c.bmp", picture(2))
    segmenter, out = Segmenter(run), tmp_path / "out"
    found = predict_files(
        segmenter, [str(tmp_path / "in"), str(tmp_path / "c.bmp")], str(out), shown=False
    )
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    stems = ("a", "c", "deep/b")
    assert files == sorted(f"{s}_{kind}.png" for s in stems for kind in ("labels", "overlay"))
    labels = np.asarray(Image.open(out / "a_labels.png"))
    assert (labels == segmenter.label(picture(0))).all()
    shown = np.asarray(Image.open(out / "a_overlay.png"))
    assert (shown == overlay(picture(0), labels, segmenter.palette)).all()
    assert [p.frames for p in found] == [1, 1, 1]
    assert sum(found[0].shares.values()) == pytest.approx(1)
    name, share = max(found[0].shares.items(), key=lambda item: item[1])
    assert share == pytest.approx((labels == segmenter.class_names.index(name)).mean())
    assert found[0].seconds > 0


def test_a_bar_counts_the_files_on_a_terminal(run, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress_bar, "Console", lambda stderr: Console(file=screen, force_terminal=True)
    )
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name, picture())
    predict_files(Segmenter(run), [str(tmp_path)], str(tmp_path / "out"))
    assert "b.png" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    shown = screen.tell()
    predict_files(Segmenter(run), [str(tmp_path)], str(tmp_path / "out"), shown=False)
    assert screen.tell() == shown


def test_a_picture_that_a_camera_took_upright_is_labelled_upright(run, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be seen after a quarter turn to the right
    lying = Image.fromarray(picture())
    lying.save(tmp_path / "a.png", exif=turned)
    segmenter = Segmenter(run)
    predict_files(segmenter, [str(tmp_path / "a.png")], str(tmp_path / "out"), shown=False)
    labels = np.asarray(Image.open(tmp_path / "out" / "a_labels.png"))
    assert labels.shape == (30, 20)
    assert (labels == segmenter.label(np.rot90(picture(), -1).copy())).all()


def test_what_was_written_before_is_no_source(tmp_path):
    for name in ("a.png", "out/a_overlay.png", "out/deep/b_labels.png"):
        write_picture(tmp_path / name, picture())
    found = gather([str(tmp_path)], str(tmp_path / "out"))
    assert [str(name) for _, name in found] == ["a"]
    assert len(gather([str(tmp_path)])) == 3
    assert len(gather([str(tmp_path / "out")], str(tmp_path / "out"))) == 2


def test_what_is_read_is_never_written_over(run, tmp_path):
    before = {}
    for name in ("a.png", "a_overlay.png"):
        write_picture(tmp_path / name, picture())
        before[name] = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=r"out must not hold what is to be read, got .*a_overlay"):
        predict_files(Segmenter(run), [str(tmp_path)], str(tmp_path), shown=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_sources_that_cannot_be(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must name files or folders, got .*none"):
        gather([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="must hold pictures or videos, got none"):
        gather([str(tmp_path)])
    with pytest.raises(ValueError, match="at least one file or folder, got none"):
        gather([])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt must be a picture .* or a video"):
        gather([str(tmp_path / "a.txt")])
    for name in ("x/a.png", "y/a.png"):
        write_picture(tmp_path / name, picture())
    with pytest.raises(ValueError, match=r"different names, got .*x/a\.png and .*y/a\.png"):
        gather([str(tmp_path / "x"), str(tmp_path / "y")])
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"predict: .*broken\.png must be a picture"):
        predict_files(Segmenter(run), [str(tmp_path / "broken.png")], str(tmp_path), shown=False)
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\], got 2"):
        predict_files(Segmenter(run), [str(tmp_path / "x")], str(tmp_path), opacity=2)


def test_checkpoints_that_cannot_be(run, tmp_path):
    Trainer(tiny_config(tmp_path, epochs=1, limit_train=32)).fit()
    with pytest.raises(ValueError, match="must be of a run of pyeff train erfnet, got a training"):
        Segmenter(str(tmp_path))
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'fp8'"):
        Segmenter(run, precision="fp8")
    with pytest.raises(ValueError, match=r"size must be positive, .* got \(0, 4\)"):
        Segmenter(run, size=(0, 4))
    with pytest.raises(ValueError, match=r"left out with own_size, got \(8, 8\)"):
        Segmenter(run, size=(8, 8), own_size=True)
