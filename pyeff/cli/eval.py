"""`pyeff eval`: what every level of a checkpoint gives and costs."""

import json
import sys
from typing import Annotated, Any

import typer


def evaluate(
    checkpoint: Annotated[
        str, typer.Option(help="A run's folder, or a .safetensors file that pyeff wrote.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Folder of the data sets; by default the run's own.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    accuracy: Annotated[
        bool, typer.Option(help="Run the test images; without it only the costs are shown.")
    ] = True,
    latency: Annotated[bool, typer.Option(help="Measure the time of one image a level.")] = True,
    limit_test: Annotated[
        int | None, typer.Option(help="At most this many test images of each task.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    k: Annotated[
        int | None, typer.Option(help="Of a HydraNet: branches that run for each image.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Force one backend of the operators (torch, cpp, ...).")
    ] = None,
) -> None:
    """Print accuracy, parameters, MACs, bytes and measured latency of every task and level.

    Of a HydraNet also what its gate does, and the use and accuracy of its branches.

    Example: pyeff eval --checkpoint runs/dvn --data data --json
    """
    from pyeff.train.report import evaluate_checkpoint, print_results

    try:
        results = evaluate_checkpoint(
            checkpoint,
            data=data,
            accuracy=accuracy,
            latency=latency,
            limit_test=limit_test,
            device=device,
            backend=backend,
            k=k,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        document: dict[str, Any] = {
            "checkpoint": checkpoint,
            "results": [line.to_json() for line in results],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        print_results(results)
