"""`pyeff tune`: which backend is fastest on this machine."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pyeff._measured import Table


def tune(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    operators: Annotated[
        list[str] | None, typer.Option("--operator", help="Only this one; may be repeated.")
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", help="Only this one (float32, bfloat16, float16); may be repeated."
        ),
    ] = None,
    channels: Annotated[
        list[int] | None, typer.Option(help="Channels of an input; may be repeated.")
    ] = None,
    slice_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long a call is repeated within a round.")
    ] = 0.01,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it there instead, where it does not choose backends."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON instead of a summary.")
    ] = False,
) -> None:
    """Measure the backends of all operators on a device and let the fastest run from now on.

    Takes some minutes, in which nothing else should use the device. The table goes to .cache/pyeff
    in the home folder; `pyeff info` names it, and without it the shipped choice counts again.

    Example: pyeff tune --device cpu --operator nested_conv2d --dtype float32
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from pyeff import tune as tuning
    from pyeff.tune.cases import CHANNELS

    try:
        known = {str(d).removeprefix("torch."): d for d in tuning.DTYPES}
        for name in dtypes or ():
            if name not in known:
                raise ValueError(f"dtype must be of {', '.join(known)}, got {name!r}")
        with Progress(console=Console(stderr=True), transient=True) as bar:
            shown = bar.add_task("tuning", total=None)
            table = tuning.tune(
                device,
                operators=operators,
                dtypes=[known[name] for name in dtypes or ()] or None,
                channels=channels or CHANNELS,
                slice_seconds=slice_seconds,
                progress=lambda done, total, text: bar.update(
                    shown, completed=done, total=total, description=text
                ),
            )
        where = tuning.save(table, out)
    except (ValueError, OSError, torch.AcceleratorError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        typer.echo(json.dumps(table.to_json(), indent=2))
        return
    _print(table)
    typer.echo(f"{len(table.rows)} rows written to {where}")


def _print(table: "Table") -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    shown = Shown(box=None, pad_edge=False, title=table.device, title_justify="left")
    for name in ("operator", "direction", "dtype", "fastest (number of shapes)"):
        shown.add_column(name)
    won: dict[tuple[str, str, str], Counter[str]] = {}
    for row in table.rows:
        fastest = min(row.seconds, key=row.seconds.__getitem__)
        won.setdefault(row[:3], Counter())[fastest] += 1
    for key, counts in won.items():
        text = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        shown.add_row(*key, text)
    Console().print(shown)
