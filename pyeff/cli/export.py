"""`pyeff export`: a checkpoint as a program that runs without its training."""

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pyeff.cli._options import size_of


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A run's folder, or a .safetensors file that pyeff wrote.")
    ],
    out: Annotated[str, typer.Option(help="The file to write, such as small.pt2 or small.onnx.")],
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the images; by default as the network was trained."),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write ONNX; by default where --out ends in .onnx.")
    ] = False,
    dynamic_batch: Annotated[
        bool, typer.Option(help="A program for any number of images, rather than for one.")
    ] = True,
    task: Annotated[
        str | None, typer.Option(help="Of a nested network: the task; needed if it has several.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="Of a nested network: the level; by default the largest.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="How far the program's output may differ, over the largest."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of words.")
    ] = False,
) -> None:
    """Write a trained network as a program for torch.export.load, or as ONNX.

    Expanded layers are contracted first, and the contracted network is held against the expanded
    one. The file is read back and run on random images before it gets its name. It takes what the
    network took in training: normalised images.

    Example: pyeff export runs/ck --out small.pt2
    """
    from pyeff.deploy import export as write

    try:
        model, example = _network(checkpoint, size, task, level)
        format = "onnx" if onnx else None
        report = write(
            model, example, out, format=format, dynamic_batch=dynamic_batch, tolerance=tolerance
        )
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        typer.echo(json.dumps({"checkpoint": checkpoint, **report.to_json()}, indent=2))
    else:
        typer.echo(report)


def _network(checkpoint: str, size: str | None, task: str | None, level: int | None) -> Any:
    """A checkpoint's network, and an image of the size that it is for."""
    import torch

    from pyeff.checkpoint import read_archive, rebuild
    from pyeff.models import NestedResNet

    tensors, meta = read_archive(checkpoint)
    model = rebuild(tensors, meta, checkpoint)
    if isinstance(model, NestedResNet):
        if task is None and len(meta.get("tasks", {})) == 1:
            (task,) = meta["tasks"]
        model = model.materialise(task, level).eval()
    elif level is not None or task is not None:
        raise ValueError(f"export: task and level must be left out for {type(model).__name__}")
    like = next(model.parameters())
    config = meta["model"]
    while config["family"] == "compressed":
        config = config["base"]
    height, width = _size(meta, task) if size is None else size_of(size)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, config["in_channels"], height, width, generator=generator)
    return model, example.to(like.dtype)


def _size(meta: Mapping[str, Any], task: str | None) -> tuple[int, int]:
    """Rows and columns of the images that a network was trained with."""
    if meta.get("tasks"):
        known = meta["tasks"]
        shape = known[task if task in known else next(iter(known))]["image_shape"]
        return shape[1], shape[2]
    size = meta.get("config", {}).get("size")
    if size is None:
        raise ValueError("export: size must be given for a network that was saved without its run")
    return size[0], size[1]
