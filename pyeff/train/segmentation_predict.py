"""A trained network on pictures and videos: a class for every pixel, and files to look at."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pyeff.checkpoint import read_archive, rebuild, write_bytes_atomically
from pyeff.train.network import lay_out
from pyeff.train.processes import choose_device
from pyeff.train.progress_bar import Bar, progress_bar
from pyeff.train.segmentation_augment import to_input
from pyeff.train.segmentation_data import SUFFIXES, Colour, read_picture, resized
from pyeff.train.segmentation_overlay import label_png, overlay, png
from pyeff.train.segmentation_video import (
    VIDEO_SUFFIXES,
    is_video,
    open_video,
    require_imageio,
    write_video,
)


class Segmenter:
    """A trained network that labels the pixels of a picture of any size.

    Args:
        checkpoint: a run's folder, or a file that ``pyeff train erfnet`` wrote.
        size: ``(H, W)`` that the network sees; ``None`` for the size that it was trained at.
        own_size: the network sees every picture at the picture's own size instead.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32`` (of a network that was trained in float64, that), or ``bf16``: weights
            and maps in bfloat16.

    Attributes:
        model: the network, in eval mode.
        class_names: one a class.
        palette: a colour a class.
        size: what the network sees; ``None`` for own sizes.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not of such a run, the precision is unknown, or both sizes are given.

    Example:
        >>> segmenter = Segmenter("runs/erfnet")  # doctest: +SKIP
        >>> labels = segmenter.label(image)  # doctest: +SKIP
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        size: tuple[int, int] | None = None,
        own_size: bool = False,
        device: str = "auto",
        precision: str = "fp32",
    ) -> None:
        tensors, meta = read_archive(checkpoint)
        if "segmentation" not in meta:
            raise ValueError(
                f"predict: {checkpoint} must be of a run of pyeff train erfnet, got a "
                f"{meta.get('kind')} of something else"
            )
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"predict: precision must be fp32 or bf16, got {precision!r}")
        if size is not None and (own_size or min(size) < 1):
            raise ValueError(
                f"predict: size must be positive, and left out with own_size, got {size}"
            )
        described = meta["segmentation"]
        self.class_names: tuple[str, ...] = tuple(described["class_names"])
        self.palette: tuple[Colour, ...] = tuple(tuple(c) for c in described["palette"])
        trained = described["size"][0], described["size"][1]
        self.size: tuple[int, int] | None = None if own_size else (size or trained)
        self.device = choose_device(device)
        self.model = rebuild(tensors, meta, checkpoint).to(self.device)
        if precision == "bf16":
            # Not autocast: it would round every weight again at every call.
            self.model.to(torch.bfloat16)
        lay_out(self.model, torch.channels_last)
        self._dtype = next(self.model.parameters()).dtype

    def label(self, image: np.ndarray) -> np.ndarray:
        """Labels a picture.

        Args:
            image: uint8 ``[H, W, 3]``.

        Returns:
            uint8 ``[H, W]``: a class for every pixel. The network's logits are scaled up to the
            picture's own size.
        """
        seen = resized(image, self.size or (image.shape[0], image.shape[1]))
        x = to_input(torch.from_numpy(seen.copy()).unsqueeze(0)).to(self.device, self._dtype)
        with torch.inference_mode():
            logits = self.model(x)
            logits = logits.float() if logits.dtype == torch.bfloat16 else logits
            if logits.shape[2:] != image.shape[:2]:
                own = (image.shape[0], image.shape[1])
                logits = functional.interpolate(logits, own, mode="bilinear", align_corners=False)
            labels: np.ndarray = logits.argmax(1)[0].to(torch.uint8).cpu().numpy()
        return labels


@dataclass(frozen=True)
class Prediction:
    """What was written for one picture or video.

    Attributes:
        source: the picture or video.
        overlay: picture, or video, with the colours over it.
        labels: picture of class numbers; of a video a folder with one a frame.
        frames: 1 for a picture.
        shares: the share of all pixels of every class that was found.
        seconds: of the network and what scales its output, for one frame.
    """

    source: str
    overlay: str
    labels: str
    frames: int
    shares: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gather(sources: Sequence[str], out: str | None = None) -> list[tuple[Path, Path]]:
    """All pictures and videos that some paths name.

    Args:
        sources: files, and folders to search at any depth.
        out: a folder below one of them that is left out, since it holds what was written before.

    Returns:
        Each file, with its name below the output folder, without a suffix.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is neither picture nor video, a folder holds none, or two files would be
            written under one name.
    """
    found: list[tuple[Path, Path]] = []
    for source in map(Path, sources):
        if source.is_dir():
            left_out = _inner(out, source)
            files = sorted(
                p for p in source.rglob("*") if _is_known(p) and left_out not in p.resolve().parents
            )
            if not files:
                raise ValueError(f"predict: {source} must hold pictures or videos, got none")
            found += [(file, file.relative_to(source).with_suffix("")) for file in files]
        elif not source.exists():
            raise FileNotFoundError(f"predict: images must name files or folders, got {source}")
        elif not _is_known(source):
            raise ValueError(
                f"predict: {source} must be a picture {sorted(SUFFIXES)} or a video "
                f"{sorted(VIDEO_SUFFIXES)}"
            )
        else:
            found.append((source, Path(source.stem)))
    if not found:
        raise ValueError("predict: images must name at least one file or folder, got none")
    seen: dict[Path, Path] = {}
    for file, name in found:
        if name in seen:
            raise ValueError(
                f"predict: images must have different names, got {seen[name]} and {file}"
            )
        seen[name] = file
    return found


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES


def _inner(out: str | None, source: Path) -> Path | None:
    """``out`` if it is a folder below ``source``."""
    if out is None:
        return None
    folder = Path(out).resolve()
    return folder if source.resolve() in folder.parents else None


def predict_files(
    segmenter: Segmenter,
    sources: Sequence[str],
    out: str,
    *,
    opacity: float = 0.5,
    shown: bool = True,
) -> list[Prediction]:
    """Labels pictures and videos, and writes ``NAME_overlay`` and ``NAME_labels`` for each.

    Args:
        segmenter: the network.
        sources: files, and folders to search at any depth.
        out: folder to write to; made if it is missing.
        opacity: of the colours over the picture.
        shown: a progress bar, on a terminal.

    Returns:
        One entry a file.

    Raises:
        FileNotFoundError, ValueError: see :func:`gather`; a file is broken; the opacity is out of
            [0, 1].
        ImportError: pillow is missing, or imageio for a video.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"predict: opacity must be in [0, 1], got {opacity}")
    files, folder = gather(sources, out), Path(out)
    if any(map(is_video, (file for file, _ in files))):
        require_imageio()  # what is missing shall be said before anything is written
    _check_targets(files, folder)
    with progress_bar(len(files), 0, shown) as bar:
        return [
            (_video if is_video(file) else _picture)(segmenter, file, folder / name, opacity, bar)
            for file, name in files
        ]


def _targets(file: Path, name: Path) -> tuple[Path, Path]:
    """Where the overlay and the labels of a file go."""
    ends = ("_overlay.mp4", "_labels") if is_video(file) else ("_overlay.png", "_labels.png")
    return Path(f"{name}{ends[0]}"), Path(f"{name}{ends[1]}")


def _check_targets(files: Sequence[tuple[Path, Path]], folder: Path) -> None:
    """Refuses to write over a file that is to be read."""
    read = {file.resolve() for file, _ in files}
    for file, name in files:
        for target in _targets(file, folder / name):
            if target.resolve() in read:
                raise ValueError(
                    f"predict: out must not hold what is to be read, got {target}, which the "
                    f"result of {file} would replace"
                )


class _Tally:
    """Time and pixels over the frames of a file."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._counts = np.zeros(256, dtype=np.int64)
        self.frames, self._seconds = 0, 0.0

    def label(self, image: np.ndarray) -> np.ndarray:
        """Labels a frame and counts it."""
        began = time.perf_counter()
        labels = self._segmenter.label(image)
        self._seconds += time.perf_counter() - began
        self._counts += np.bincount(labels.reshape(-1), minlength=256)
        self.frames += 1
        return labels

    def prediction(self, source: Path, overlay_path: Path, labels: Path) -> Prediction:
        """What was found, in words and numbers."""
        names, total = self._segmenter.class_names, max(1, int(self._counts.sum()))
        shares = {n: int(c) / total for n, c in zip(names, self._counts, strict=False) if c}
        seconds = self._seconds / max(1, self.frames)
        return Prediction(str(source), str(overlay_path), str(labels), self.frames, shares, seconds)


def _picture(segmenter: Segmenter, file: Path, name: Path, opacity: float, bar: Bar) -> Prediction:
    tally, image = _Tally(segmenter), read_picture(file, "predict", upright=True)
    labels = tally.label(image)
    over, label = _targets(file, name)
    write_bytes_atomically(over, png(overlay(image, labels, segmenter.palette, opacity)))
    write_bytes_atomically(label, label_png(labels, segmenter.palette))
    bar.advance(file.name)
    return tally.prediction(file, over, label)


def _video(segmenter: Segmenter, file: Path, name: Path, opacity: float, bar: Bar) -> Prediction:
    tally, (over, folder) = _Tally(segmenter), _targets(file, name)
    name.parent.mkdir(parents=True, exist_ok=True)
    rate, pictures, close = open_video(file)
    # All or nothing, in a folder of its own: a temporary file of tempfile's would stay private.
    with tempfile.TemporaryDirectory(dir=name.parent, prefix=".") as work:
        labels, video = Path(work) / "labels", Path(work) / over.name
        labels.mkdir()

        def painted() -> Iterator[np.ndarray]:
            for image in pictures:
                found = tally.label(image)
                content = label_png(found, segmenter.palette)
                (labels / f"{tally.frames - 1:06d}.png").write_bytes(content)
                bar.tell(f"{file.name} frame {tally.frames}")
                yield overlay(image, found, segmenter.palette, opacity)

        try:
            write_video(video, painted(), rate)
        finally:
            close()
        if tally.frames == 0:
            raise ValueError(f"predict: {file} must hold frames, got none")
        _replace_frames(labels, folder)
        os.replace(video, over)
    bar.advance(file.name)
    return tally.prediction(file, over, folder)


def _replace_frames(written: Path, folder: Path) -> None:
    """Moves numbered pictures into a folder; those of a longer video before do not stay."""
    folder.mkdir(exist_ok=True)
    frames = sorted(written.iterdir())
    for stale in folder.glob("[0-9]" * 6 + ".png"):
        stale.unlink()
    for frame in frames:
        os.replace(frame, folder / frame.name)
