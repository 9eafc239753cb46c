"""What a run whose network learned its own size leaves behind beside the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyeff.checkpoint import write_bytes_atomically
from pyeff.train.compress_session import layer_counts
from pyeff.train.compression_plots import plot_neurons, plot_per_epoch

FILE_NAME = "compression.json"


def write_compression(
    out: Path, records: Sequence[dict[str, Any]], compressed: dict[str, Any]
) -> None:
    """Writes ``compression.json``, and the plots of what the penalties did.

    ``neurons.png`` has the neurons of each layer before and after, ``live.png`` those that were
    alive after each epoch, ``ranks.png`` the ranks.

    Args:
        out: the run's folder.
        records: lines of ``metrics.jsonl``.
        compressed: what the reload left, as :meth:`pyeff.compress.Compressed.to_json` tells it.

    Raises:
        ImportError: matplotlib is missing.
    """
    live, ranks = layer_counts(records, "group", "live"), layer_counts(records, "rank", "ranks")
    document = {**compressed, "live": live, "ranks": ranks}
    write_bytes_atomically(out / FILE_NAME, (json.dumps(document, indent=1) + "\n").encode())
    channels = compressed["channels"]
    if channels:
        before = {name: sizes[0] for name, sizes in channels.items()}
        after = {name: sizes[1] for name, sizes in channels.items()}
        plot_neurons(before, after, out / "neurons.png")
    if live:
        plot_per_epoch(live, out / "live.png", label="live neurons")
    if ranks:
        plot_per_epoch(ranks, out / "ranks.png", label="rank")
