"""Videos: what happens to frames by a stand-in for imageio, and by imageio where it is there."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from train.segmentation_tiny import segmentation_config, write_picture
from typer.testing import CliRunner

from pyeff.cli.main import app
from pyeff.train.segmentation_overlay import overlay
from pyeff.train.segmentation_predict import Segmenter, predict_files
from pyeff.train.segmentation_trainer import SegmentationTrainer
from pyeff.train.segmentation_video import open_video, write_video


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    SegmentationTrainer(segmentation_config(out, stage1_epochs=0, epochs=1)).fit()
    return str(out)


def picture(seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def predict(run, *sources, out):
    return predict_files(Segmenter(run), [str(s) for s in sources], str(out), shown=False)


class Writer:
    written: dict = {}  # noqa: RUF012

    def __init__(self, path, fps, macro_block_size):
        self.path, self.frames, self.fps = path, [], fps
        assert macro_block_size == 2

    def append_data(self, frame):
        self.frames.append(frame)

    def close(self):
        Writer.written = {"frames": self.frames, "fps": self.fps}
        with open(self.path, "wb") as file:
            file.write(b"video")


class Reader(list):
    def get_meta_data(self):
        return {"fps": 12.0}

    def close(self):
        self.closed = True


@pytest.fixture
def imageio(monkeypatch):
    """Stands in for imageio: a reader of three frames and a writer that keeps them."""
    package, v2 = ModuleType("imageio"), ModuleType("imageio.v2")
    frames = [picture(k) for k in range(2)]
    # An alpha channel, as of an animated picture, is left out.
    frames.append(np.dstack([picture(2), np.zeros((20, 30), dtype=np.uint8)]))
    reader = Reader(frames)
    package.v2, v2.get_reader, v2.get_writer = v2, lambda path: reader, Writer
    monkeypatch.setitem(sys.modules, "imageio", package)
    monkeypatch.setitem(sys.modules, "imageio.v2", v2)
    return reader


def test_a_video_becomes_a_video(run, tmp_path, imageio):
    (tmp_path / "drive.mp4").write_bytes(b"x")
    segmenter, out = Segmenter(run), tmp_path / "out"
    (found,) = predict_files(segmenter, [str(tmp_path / "drive.mp4")], str(out), shown=False)
    assert imageio.closed
    assert (found.frames, found.overlay) == (3, str(out / "drive_overlay.mp4"))
    assert (out / "drive_overlay.mp4").read_bytes() == b"video"
    assert Writer.written["fps"] == 12.0
    names = sorted(p.name for p in out.rglob("*"))
    assert names == ["000000.png", "000001.png", "000002.png", "drive_labels", "drive_overlay.mp4"]
    for index in range(3):
        labels = np.asarray(Image.open(out / "drive_labels" / f"{index:06d}.png"))
        assert (labels == segmenter.label(picture(index))).all()
        expected = overlay(picture(index), labels, segmenter.palette)
        assert (Writer.written["frames"][index] == expected).all()


def test_a_video_is_readable_like_any_other_file(run, tmp_path, imageio):
    (tmp_path / "drive.mp4").write_bytes(b"x")
    predict_files(Segmenter(run), [str(tmp_path)], str(tmp_path / "out"), shown=False)
    (tmp_path / "plain").write_bytes(b"x")
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out" / "drive_overlay.mp4").stat().st_mode == mode


def test_a_video_that_breaks_off_leaves_no_file(run, tmp_path, imageio):
    (tmp_path / "drive.mp4").write_bytes(b"x")
    imageio.append(np.zeros((20, 30, 3), dtype=np.float32))  # no picture
    with pytest.raises(TypeError):
        predict_files(
            Segmenter(run), [str(tmp_path / "drive.mp4")], str(tmp_path / "out"), shown=False
        )
    assert imageio.closed
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_imageio_is_named_before_anything_is_written(run, tmp_path, monkeypatch):
    for name in ("imageio", "imageio.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    write_picture(tmp_path / "in" / "a.png", picture())
    (tmp_path / "in" / "b.mp4").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"imageio is needed .* pip install imageio\[ffmpeg\]"):
        predict_files(Segmenter(run), [str(tmp_path / "in")], str(tmp_path / "out"), shown=False)
    assert not (tmp_path / "out").exists()


def test_a_broken_video_is_named(run, tmp_path, imageio, monkeypatch):
    def refuse(path):
        raise OSError("no backend")

    monkeypatch.setattr(sys.modules["imageio.v2"], "get_reader", refuse)
    (tmp_path / "drive.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"drive\.mp4 must be a video, got no backend"):
        predict_files(Segmenter(run), [str(tmp_path / "drive.mp4")], str(tmp_path), shown=False)


def test_frames_of_a_longer_video_before_do_not_stay(run, tmp_path, imageio):
    (tmp_path / "drive.mp4").write_bytes(b"x")
    predict(run, tmp_path / "drive.mp4", out=tmp_path / "out")
    (tmp_path / "out" / "drive_labels" / "note.txt").write_text("mine")
    del imageio[1:]
    (found,) = predict(run, tmp_path / "drive.mp4", out=tmp_path / "out")
    assert found.frames == 1
    left = sorted(p.name for p in (tmp_path / "out" / "drive_labels").iterdir())
    assert left == ["000000.png", "note.txt"]


def test_a_video_without_frames_or_with_a_broken_one_is_named(run, tmp_path, imageio, monkeypatch):
    (tmp_path / "drive.mp4").write_bytes(b"x")

    def iterate(self):
        yield picture()
        raise RuntimeError("end of file")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "__iter__", iterate)
        with pytest.raises(ValueError, match=r"drive\.mp4 must be a whole video, .* after frame 1"):
            predict(run, tmp_path / "drive.mp4", out=tmp_path / "out")
    imageio.clear()
    with pytest.raises(ValueError, match=r"drive\.mp4 must hold frames, got none"):
        predict(run, tmp_path / "drive.mp4", out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("about", "rate"),
    [({"fps": 12.0}, 12.0), ({"duration": 40.0, "fps": 0}, 25.0), ({"duration": 100}, 10.0)],
)
def test_the_rate_of_a_video_and_of_an_animated_picture(imageio, monkeypatch, about, rate):
    monkeypatch.setattr(Reader, "get_meta_data", lambda self: about)
    assert open_video(Path("a.gif"))[0] == rate


real = pytest.mark.skipif(
    find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None,
    reason="needs imageio[ffmpeg]",
)


def striped(index, size):
    """A frame that a codec keeps: two halves of one colour each, others in every frame."""
    frame = np.zeros((*size, 3), dtype=np.uint8)
    frame[:, : size[1] // 2] = (200, 40 * index, 30)
    frame[:, size[1] // 2 :] = (20, 60, 250 - 40 * index)
    return frame


def whole(path):
    """A video's rate and frames."""
    rate, frames, close = open_video(path)
    try:
        return rate, list(frames)
    finally:
        close()


@real
@pytest.mark.parametrize("size", [(48, 64), (45, 63)], ids=["even", "odd"])
def test_a_real_video_by_the_command(run, tmp_path, size):
    source, out = tmp_path / "drive.mp4", tmp_path / "out"
    write_video(source, (striped(index, size) for index in range(5)), 8)
    even = tuple(-(-side // 2) * 2 for side in size)
    result = CliRunner().invoke(
        app,
        ["predict", "erfnet", "--checkpoint", run, "--images", str(source), "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    assert "drive_overlay.mp4" in result.output
    labels = sorted((out / "drive_labels").iterdir())
    assert [path.name for path in labels] == [f"{index:06d}.png" for index in range(5)]
    segmenter, (_, seen) = Segmenter(run), whole(source)
    rate, shown = whole(out / "drive_overlay.mp4")
    assert (rate, len(shown), shown[0].shape) == (8.0, 5, (*even, 3))
    for index, path in enumerate(labels):
        label = np.asarray(Image.open(path))
        assert (label == segmenter.label(seen[index])).all()
        expected = overlay(seen[index], label, segmenter.palette)
        # A codec that loses some of it.
        assert np.abs(shown[index].astype(float) - expected).mean() < 25


@real
def test_a_real_animated_picture_keeps_its_time(run, tmp_path):
    frames = [Image.fromarray(striped(index, (40, 50))) for index in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    (found,) = predict(run, tmp_path / "a.gif", out=tmp_path / "out")
    assert found.frames == 4
    rate, shown = whole(tmp_path / "out" / "a_overlay.mp4")
    assert (rate, len(shown)) == (5.0, 4)


@real
def test_what_is_no_real_video_is_named(run, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(ValueError, match=r"a\.mp4 must be a (whole )?video, got"):
        predict(run, tmp_path / "a.mp4", out=tmp_path / "out")
    write_picture(tmp_path / "b.png", picture())
    assert not list((tmp_path / "out").glob("*.mp4"))
