"""`pyeff demo`: nested networks, a HydraNet and ERFNet in minutes, from bundled data to a page."""

import sys
from pathlib import Path
from typing import Annotated

import typer

_DEFAULT_PARAMS = 30_000


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, plot and checkpoints.")] = Path(
        "demo_out"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    budget_params: Annotated[
        int | None,
        typer.Option(help=f"Most parameters; {_DEFAULT_PARAMS:,} if no budget is given."),
    ] = None,
    budget_macs: Annotated[int | None, typer.Option(help="Most multiply-adds an image.")] = None,
    budget_memory: Annotated[
        int | None, typer.Option(help="Most bytes of weights and activations.")
    ] = None,
    budget_latency_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds for one image.")
    ] = None,
) -> None:
    """Train a nested network and a HydraNet on bundled digits, and ERFNet on drawn streets.

    Two tasks (which digit, odd or even), four levels, one set of weights; beside it the plain
    network, trained alone on each task; and a HydraNet, of whose five branches an image runs some.
    ERFNet labels the pixels of street scenes. Writes report.html, levels.png, the checkpoints.

    Example: pyeff demo --out demo_out --budget-params 30000
    """
    from rich.console import Console

    from pyeff.cli._demo_study import run_study
    from pyeff.train import TrainingInterrupted

    budgets = {
        "max_params": budget_params,
        "max_macs": budget_macs,
        "max_memory": budget_memory,
        "max_latency": None if budget_latency_ms is None else budget_latency_ms / 1e3,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    try:
        run_study(out, epochs, seed, given or {"max_params": _DEFAULT_PARAMS}, Console())
    except TrainingInterrupted:
        typer.echo("stopped", err=True)
        # 128 + SIGINT, as shells have it.
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
