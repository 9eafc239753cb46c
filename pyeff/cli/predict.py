"""`pyeff predict erfnet`: a trained network on pictures and videos."""

import json
import sys
from typing import Annotated

import typer

from pyeff.cli._options import size_of

predict = typer.Typer(
    name="predict",
    help="Run a trained network on pictures of your own.",
    no_args_is_help=True,
)


@predict.callback()
def _group() -> None:
    """Run a trained network on pictures of your own."""


@predict.command("erfnet")
def predict_erfnet(
    checkpoint: Annotated[
        str, typer.Option(help="A run's folder, or a .safetensors file of pyeff train erfnet.")
    ],
    images: Annotated[
        list[str],
        typer.Option(help="A picture, a video, or a folder of them; once for each."),
    ],
    out: Annotated[str, typer.Option(help="Folder for overlays and labels.")] = "predictions",
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH that the network sees, or own; by default as trained."),
    ] = None,
    opacity: Annotated[float, typer.Option(help="Of the colours, 0 to 1.")] = 0.5,
    precision: Annotated[str, typer.Option(help="fp32, or bf16: weights and maps.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str | None, typer.Option(help="Force one backend of the operators (torch, cpp, ...).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="A progress bar, on a terminal.")] = True,
) -> None:
    """Label every pixel of pictures and videos.

    Writes NAME_overlay.png (the picture with the classes' colours) and NAME_labels.png (pixels are
    class numbers, shown in colour); of a video NAME_overlay.mp4 and a folder NAME_labels.

    Example: pyeff predict erfnet --checkpoint runs/camvid --images photos --images drive.mp4
    --out predictions
    """
    import contextlib

    from pyeff.ops import backend as forced_backend
    from pyeff.train.segmentation_predict import Segmenter, predict_files

    try:
        segmenter = Segmenter(
            checkpoint,
            size=None if size is None or size == "own" else size_of(size),
            own_size=size == "own",
            device=device,
            precision=precision,
        )
        with forced_backend(backend) if backend else contextlib.nullcontext():
            found = predict_files(segmenter, images, out, opacity=opacity, shown=progress)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        # 128 + SIGINT, as shells have it.
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    if as_json:
        document = {"checkpoint": checkpoint, "predictions": [one.to_json() for one in found]}
        typer.echo(json.dumps(document, indent=2))
        return
    for one in found:
        largest = sorted(one.shares.items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in largest)
        typer.echo(f"{one.overlay}  {1e3 * one.seconds:.0f} ms a frame  {shares}")
