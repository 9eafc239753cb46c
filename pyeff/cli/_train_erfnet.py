"""`pyeff train erfnet`: segmentation, from a folder of pictures to a trained network."""

from typing import Any

import typer

from pyeff.cli._options import Option, exits_of_training, is_given, make_command, size_of

_OPTIONS: list[Option] = [
    (
        "dataset",
        str,
        "streets",
        "camvid, cityscapes, folder (images/, labels/ and classes.txt), or streets (drawn, no "
        "files).",
    ),
    ("data", str | None, None, "Folder that holds CamVid, or leftImg8bit and gtFine, or images."),
    ("out", str, "runs/erfnet", "Folder for checkpoint, metrics, table and pictures."),
    ("resume", bool, False, "Go on from the checkpoint in --out, with its settings."),
    ("overwrite", bool, False, "Start anew although --out holds a checkpoint."),
    ("size", str, "180x240", "HEIGHTxWIDTH to train at."),
    ("order", str, "vertical_first", "Of the pairs: vertical_first or horizontal_first."),
    ("dense", bool, False, "Ordinary 3 x 3 convolutions in place of the pairs, to compare with."),
    (
        "width",
        list[int] | None,
        None,
        "Channels at 1/2, 1/4 and 1/8 of the size, once for each, to replace 16, 64 and 128.",
    ),
    ("stage1-epochs", int, 20, "Passes with the encoder alone; 0 skips stage 1."),
    ("epochs", int, 40, "Passes with the whole network."),
    ("batch-size", int, 8, "Pictures a step, over all processes."),
    ("lr", float, 5e-4, "Adam's learning rate in each stage's first epoch."),
    ("power", float, 0.9, "Of the rate's fall over a stage's epochs."),
    ("weight-decay", float, 1e-4, "L2 in the gradient."),
    ("weighted", bool, True, "Weigh classes by 1 / ln(a + their share of the pixels)."),
    ("init-from", str | None, None, "Folder or file of a run to start from, such as of streets."),
    ("keep", str, "best", "Weights that are kept: of the best epoch on val, or of the last."),
    ("augment", bool, True, "Mirror, and move by up to 2 pixels."),
    ("precision", str, "fp32", "fp32, bf16 (autocast) or fp64."),
    ("channels-last", bool, True, "Memory format of the weights."),
    ("compile", bool, False, "Run the network through torch.compile."),
    ("seed", int, 0, "Of weights, order, augmentation and dropout."),
    ("sync-batch-norm", bool, True, "Under torchrun: statistics over the joint batch."),
    ("scenes", int, 400, "Of streets: how many to learn from."),
    ("limit-train", int | None, None, "At most this many training pictures."),
    ("limit-test", int | None, None, "At most this many pictures of each other split."),
    ("eval-size", str, "training", "official: also evaluate at the labels' own size."),
    ("eval-every", int, 1, "Epochs between evaluations; a stage's last one is always evaluated."),
    ("save-every", int, 1, "Epochs between checkpoints."),
    ("device", str, "auto", "auto, cpu or cuda."),
    ("backend", str | None, None, "Force one backend of the operators (torch, cpp, triton, ...)."),
    ("progress", bool, True, "Progress bars, on a terminal."),
]
# Options that are arguments of pyeff.models.erfnet, by their name there.
_MODEL_NAMES = {"order": "order", "dense": "dense", "width": "widths"}
_ELSEWHERE = ("resume", "overwrite", "backend")


def _train(ctx: typer.Context, name: str, values: dict[str, Any]) -> None:
    from pyeff.train.segmentation_report import train_and_report_segmentation

    given = {key: value for key, value in values.items() if is_given(ctx, key)}
    with exits_of_training():
        train_and_report_segmentation(
            _config(values, given),
            resume=values["resume"],
            overwrite=values["overwrite"],
            backend=values["backend"],
        )


def _config(values: dict[str, Any], given: dict[str, Any]) -> Any:
    """The run: from all options, or from a checkpoint's settings and the options given."""
    from pathlib import Path

    from pyeff.checkpoint import FILE_NAME
    from pyeff.train.segmentation_config import segmentation_config_from_json
    from pyeff.train.segmentation_state import read_segmentation_state

    chosen = values
    settings: dict[str, Any] = {"model": {"family": "erfnet"}}
    if values["resume"]:
        settings = read_segmentation_state(Path(values["out"]) / FILE_NAME)[1]["config"]
        chosen, settings["out"] = given, values["out"]
    model = dict(settings["model"])
    for name, value in chosen.items():
        if name in _MODEL_NAMES:
            if value is not None and value != []:
                model[_MODEL_NAMES[name]] = value
        elif name == "size":
            settings["size"] = size_of(value)
        elif name not in _ELSEWHERE:
            settings[name] = value
    return segmentation_config_from_json({**settings, "model": model})


train_erfnet = make_command(
    "erfnet",
    _OPTIONS,
    "Train ERFNet to label every pixel: first its encoder alone, then all of it.\n\n"
    "Example: pyeff train erfnet --data data --dataset camvid --size 360x480 "
    "--stage1-epochs 50 --epochs 100 --precision bf16 --out runs/camvid",
    _train,
)
