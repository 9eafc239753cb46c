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
    split: Annotated[
        str | None, typer.Option(help="Of ERFNet: val or test; by default test if there is one.")
    ] = None,
    eval_size: Annotated[
        str,
        typer.Option(help="Of ERFNet: training, or official (also at the labels' own size)."),
    ] = "training",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    k: Annotated[
        int | None, typer.Option(help="Of a HydraNet: branches that run for each image.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Force one backend of the operators (torch, cpp, ...).")
    ] = None,
) -> None:
    """Print accuracy, parameters, MACs, bytes and measured latency of every task and level.

    Of a HydraNet also what its gate does, and the use and accuracy of its branches. Of ERFNet
    mIoU and pixel accuracy.

    Example: pyeff eval --checkpoint runs/dvn --data data --json
    """
    from pyeff.train.report import evaluate_checkpoint, print_results
    from pyeff.train.segmentation_report import is_segmentation_run

    try:
        if is_segmentation_run(checkpoint):
            _check_option(k is None, f"k must be left out for ERFNet, got {k}")
            _evaluate_erfnet(
                as_json,
                checkpoint=checkpoint,
                data=data,
                split=split,
                eval_size=eval_size,
                limit_test=limit_test,
                accuracy=accuracy,
                latency=latency,
                device=device,
                backend=backend,
            )
            return
        _check_option(split is None, f"split must be left out for this network, got {split}")
        _check_option(
            eval_size == "training",
            f"eval_size must be left out for this network, got {eval_size}",
        )
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


def _check_option(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"eval: {message}")


def _evaluate_erfnet(as_json: bool, *, eval_size: str, **options: Any) -> None:
    """The same for a network for segmentation."""
    from pyeff.train.segmentation_report import (
        evaluate_segmentation_checkpoint,
        print_segmentation_report,
    )

    sizes = ("training", "official")
    _check_option(
        eval_size in sizes, f"eval_size must be one of {', '.join(sizes)}, got {eval_size!r}"
    )
    report = evaluate_segmentation_checkpoint(official=eval_size == "official", **options)
    if as_json:
        document = {"checkpoint": options["checkpoint"], **report.to_json()}
        typer.echo(json.dumps(document, indent=2))
    else:
        print_segmentation_report(report)
