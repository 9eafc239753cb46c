"""Metrics as JSON lines: one object an epoch and (task, level)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyeff.checkpoint import write_bytes_atomically


class History:
    """The records of a run, in memory and in ``metrics.jsonl``.

    Args:
        path: the file; ``None`` keeps them in memory only (every process but the first).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []

    def restart(self, records: Sequence[dict[str, Any]]) -> None:
        """Sets the records, those of a checkpoint or none, and rewrites the file to match."""
        self.records = list(records)
        if self._path is not None:
            write_bytes_atomically(self._path, "".join(map(_line, self.records)).encode())

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records, to the file too."""
        self.records.extend(records)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, records)))
                file.flush()
                os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
