"""Tiles that were measured on the device at hand, and what a tuner needs to measure them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pyeff import _measured


class Asked(NamedTuple):
    """What the launchers ask :func:`pyeff.triton_kernels.tiles.choose` for."""

    task: str
    kind: str
    rows: int
    cols: int
    groups: int


# Of the process, as what backend() forces: autograd launches GPU kernels from other threads.
_tried: dict[Asked, tuple[int, ...]] = {}
_asked: list[Asked] | None = None


@contextmanager
def asking() -> Iterator[list[Asked]]:
    """Collects what is asked for in the block, each shape once."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


@contextmanager
def trying(tiles: Mapping[Asked, tuple[int, ...]]) -> Iterator[None]:
    """Answers with given tiles in the block."""
    before = dict(_tried)
    _tried.update(tiles)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def find(device: torch.device, asked: Asked) -> tuple[int, ...] | None:
    """The tile to be tried, or what was measured on the device; None where neither is known."""
    if _asked is not None and asked not in _asked:
        _asked.append(asked)
    if asked in _tried:
        return _tried[asked]
    table = _measured.table(device.type, device.index)
    return table and table.tile(asked.task, asked.kind, (asked.rows, asked.cols, asked.groups))
