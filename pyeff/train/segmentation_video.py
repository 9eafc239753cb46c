"""Videos as frames, read and written through imageio."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VIDEO_SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_RATE = 25.0  # where a file does not say


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def require_imageio() -> ModuleType:
    """imageio, with the interface that its versions share.

    Raises:
        ImportError: it is missing.
    """
    try:
        import imageio.v2 as imageio
    except ModuleNotFoundError as error:
        # Not one of pyeff's extras: it brings a whole ffmpeg with it.
        raise ImportError(
            "imageio is needed to read videos: pip install imageio[ffmpeg]", name="imageio"
        ) from error
    module: ModuleType = imageio
    return module


def open_video(file: Path) -> tuple[float, Iterator[np.ndarray], Callable[[], None]]:
    """Opens a video.

    Args:
        file: of a format that imageio reads.

    Returns:
        Frames a second, the frames as RGB uint8 ``[H, W, 3]``, and what closes the file.

    Raises:
        ValueError: it is no video, or breaks off (raised by the iterator).
        ImportError: imageio is missing.
    """
    try:
        reader = require_imageio().get_reader(file)
        rate = _rate(reader.get_meta_data())
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:
        raise ValueError(f"predict: {file} must be a video, got {error}") from error
    return rate, _frames(reader, file), reader.close


def _rate(about: Mapping[str, Any]) -> float:
    """Frames a second: a video has a rate, an animated picture tells milliseconds a frame."""
    if about.get("fps"):
        return float(about["fps"])
    return 1e3 / float(about["duration"]) if about.get("duration") else _RATE


def _frames(reader: Any, file: Path) -> Iterator[np.ndarray]:
    frames, count = iter(reader), 0
    while True:
        try:
            frame = np.asarray(next(frames))
        except StopIteration:
            return
        except (OSError, RuntimeError, ValueError, SyntaxError, IndexError) as error:
            # Decoders raise whatever they meet.
            raise ValueError(
                f"predict: {file} must be a whole video, got {error} after frame {count}"
            ) from error
        count += 1
        # An animated picture may have an alpha channel; grey ones have no third dimension.
        yield _rgb(frame)


def _rgb(frame: np.ndarray) -> np.ndarray:
    if frame.ndim == 2:
        frame = np.repeat(frame[..., None], 3, axis=2)
    return np.ascontiguousarray(frame[..., :3])


def write_video(path: Path, frames: Iterable[np.ndarray], rate: float) -> None:
    """Writes a video.

    Args:
        path: the file; its suffix decides the format.
        frames: RGB uint8 ``[H, W, 3]``, all of one size; an odd side is scaled to an even one.
        rate: frames a second.

    Raises:
        ImportError: imageio is missing.
    """
    # Sides need only be even: by default they would be scaled to multiples of 16.
    writer = require_imageio().get_writer(path, fps=rate, macro_block_size=2)
    try:
        for frame in frames:
            writer.append_data(frame)
    finally:
        writer.close()
