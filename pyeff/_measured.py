"""What ``pyeff tune`` measured on this machine: where it is kept, and what it says of a shape."""

import json
import math
import platform
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
folder = Path.home() / ".cache" / "pyeff"


class Row(NamedTuple):
    """One direction of an operator at one shape.

    Attributes:
        op: the operator.
        direction: as :func:`pyeff.ops._dispatch.choose` has it.
        dtype: without ``torch.``.
        channels: of the input, as :func:`size_of` counts them.
        pixels: of the input, over all images.
        seconds: of one call, by backend.
    """

    op: str
    direction: str
    dtype: str
    channels: int
    pixels: int
    seconds: dict[str, float]


class TileRow(NamedTuple):
    """The fastest tile of a Triton kernel at one shape; see ``triton_kernels/tiles.py``."""

    task: str
    kind: str
    rows: int
    cols: int
    groups: int
    tile: tuple[int, ...]


class Table:
    """Measured rows of one device; a shape that was not measured gets what the nearest one got.

    The nearest is the one of the smallest distance between the numbers of bits of the sizes.

    Args:
        device: its name.
        rows: of operators.
        tiles: of Triton kernels.
        versions: of what was measured.
    """

    def __init__(
        self,
        device: str,
        rows: Sequence[Row],
        tiles: Sequence[TileRow] = (),
        versions: dict[str, str] | None = None,
    ) -> None:
        self.device, self.versions = device, versions or {}
        self.rows, self.tiles = tuple(rows), tuple(tiles)
        self._fastest: dict[tuple[Any, ...], str | None] = {}
        self._tile: dict[tuple[Any, ...], tuple[int, ...] | None] = {}

    def fastest(
        self, op: str, direction: str, dtype: str, channels: int, pixels: int
    ) -> str | None:
        """The backend that was fastest at the nearest shape; None where nothing was measured."""
        key = (op, direction, dtype, channels.bit_length(), pixels.bit_length())
        if key not in self._fastest:
            rows = [r for r in self.rows if (r.op, r.direction, r.dtype) == key[:3]]
            row = min(rows, key=lambda r: _distance(key[3:], (r.channels, r.pixels)), default=None)
            self._fastest[key] = row and min(row.seconds, key=row.seconds.__getitem__)
        return self._fastest[key]

    def tile(self, task: str, kind: str, sizes: tuple[int, int, int]) -> tuple[int, ...] | None:
        """The tile that was fastest for the nearest (rows, cols, groups); None as above."""
        key = (task, kind, *(size.bit_length() for size in sizes))
        if key not in self._tile:
            rows = [r for r in self.tiles if (r.task, r.kind) == (task, kind)]
            row = min(rows, key=lambda r: _distance(key[2:], r[2:5]), default=None)
            self._tile[key] = row and row.tile
        return self._tile[key]

    def to_json(self) -> dict[str, Any]:
        """What :func:`read` reads."""
        return {
            "format": FORMAT,
            "device": self.device,
            "versions": self.versions,
            "rows": [row._asdict() for row in self.rows],
            "tiles": [row._asdict() for row in self.tiles],
        }


def _distance(bits: Sequence[Any], sizes: Sequence[int]) -> int:
    return sum((b - size.bit_length()) ** 2 for b, size in zip(bits, sizes, strict=True))


def size_of(shape: Sequence[int]) -> tuple[int, int]:
    """Channels and pixels over all images of ``[N, C, ...]``, ``[N, k, C, H, W]`` among them."""
    at = -3 if len(shape) >= 4 else -1
    channels = shape[at]
    return channels, math.prod(shape) // channels if channels else 0


def device_name(device_type: str, index: int | None = None) -> str:
    """What the device calls itself."""
    if device_type == "cuda":
        return torch.cuda.get_device_name(index)
    known = Path("/proc/cpuinfo")
    if known.exists():
        for line in known.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def path_of(device: str) -> Path:
    """The file of a device."""
    return folder / (re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() + ".json")


@cache
def table(device_type: str, index: int | None) -> Table | None:
    """The table of a device of this machine; None where it has not been measured.

    A file that cannot be read gives a warning and counts as none: it is no reason to stop.
    """
    if device_type != "cpu" and not (device_type == "cuda" and torch.cuda.is_available()):
        return None
    name = device_name(device_type, index)
    path = path_of(name)
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"{error}; the table that is shipped is used", stacklevel=2)
        return None


def read(path: Path) -> Table:
    """A table from its file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or of another format.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, expected {FORMAT}")
        rows = [Row(**row) for row in document["rows"]]
        tiles = [TileRow(**{**row, "tile": tuple(row["tile"])}) for row in document["tiles"]]
        return Table(document["device"], rows, tiles, document["versions"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"measured table: {path} must be one that pyeff tune wrote, got {error!r}"
        ) from error
