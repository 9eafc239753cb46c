"""The demo's ERFNet: trained on drawn street scenes, shown beside their labels."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pyeff import models
from pyeff.measure import measure_latency
from pyeff.train.network import lay_out
from pyeff.train.segmentation_config import SegmentationConfig
from pyeff.train.segmentation_metrics import SegmentationScore
from pyeff.train.segmentation_report import (
    SegmentationReport,
    cost_of,
    write_segmentation_report,
)
from pyeff.train.segmentation_state import FRAMES_FILE_NAME
from pyeff.train.segmentation_trainer import SegmentationTrainer

SIZE = (60, 80)
# Dropout is for hundreds of epochs.
MODEL: dict[str, Any] = {"family": "erfnet", "widths": [8, 32, 64], "dropout": [0.0, 0.0]}
SCENES, HELD_OUT = 120, 32


@dataclass(frozen=True)
class Form:
    """One row of the table: the network with one kind of convolutions.

    Attributes:
        name: in words.
        params: parameters.
        macs: multiply-adds of a picture.
        seconds: of a picture, the median.
    """

    name: str
    params: int
    macs: int
    seconds: float


@dataclass(frozen=True)
class StreetFindings:
    """What the demo shows of ERFNet.

    Attributes:
        forms: the trained network of pairs, and the same with 3 x 3 convolutions.
        score: on the held-out scenes.
        picture: some of them, labelled.
        epochs: of the encoder alone and of the whole network.
        seconds: of training.
    """

    forms: Sequence[Form]
    score: SegmentationScore
    picture: Path
    epochs: tuple[int, int]
    seconds: float

    def best(self, count: int) -> str:
        """The classes that are found best, in words."""
        found = {name: iou for name, iou in self.score.class_iou.items() if iou is not None}
        names = sorted(found, key=lambda name: -found[name])[:count]
        return ", ".join(f"{name} {found[name]:.0%}" for name in names)


def study_streets(out: Path, epochs: int, seed: int) -> StreetFindings:
    """Trains a narrow ERFNet on drawn streets, in two stages.

    Args:
        out: folder of the run.
        epochs: with the whole network; a fifth as many before with the encoder alone.
        seed: of weights, order, augmentation and dropout.

    Raises:
        ImportError: torchmetrics is missing or does not load, or pillow is missing.
        TrainingInterrupted: SIGINT came.
    """
    first = max(1, epochs // 5)
    config = SegmentationConfig(
        dataset="streets",
        out=str(out),
        size=SIZE,
        model=MODEL,
        stage1_epochs=first,
        epochs=epochs,
        batch_size=4,
        lr=4e-3,
        keep="last",
        seed=seed,
        scenes=SCENES,
        limit_test=HELD_OUT,
        eval_every=epochs,
        save_every=epochs,
    )
    trainer = SegmentationTrainer(config)
    result = trainer.fit(overwrite=True)
    report = SegmentationReport(result.scores, cost_of(result.model, SIZE), SIZE)
    write_segmentation_report(trainer, result, report)
    return StreetFindings(
        forms=_forms(result.model, trainer.data.classes),
        score=result.scores[0],
        picture=out / FRAMES_FILE_NAME,
        epochs=(first, epochs),
        seconds=result.seconds,
    )


def _forms(pairs: torch.nn.Module, classes: int) -> list[Form]:
    """Cost and time of the network and of its dense form, measured in turn."""
    like = next(pairs.parameters())
    dense = models.build({**MODEL, "classes": classes, "dense": True}).to(like.device).eval()
    networks = {"pairs of 3 x 1 and 1 x 3": pairs.eval(), "3 x 3, not trained": dense}
    for network in networks.values():
        lay_out(network, torch.channels_last)
    x = torch.rand(1, 3, *SIZE, device=like.device, dtype=like.dtype)
    x = x.to(memory_format=torch.channels_last)
    times = measure_latency(list(networks.values()), x, repeats=30, warmup=5)
    forms = []
    for (name, network), seconds in zip(networks.items(), times, strict=True):
        cost = cost_of(network, SIZE)
        forms.append(Form(name, cost.params, cost.macs, seconds))
    return forms


HEADINGS = ("Convolutions", "Parameters", "MACs", "ms a picture")


def cells(form: Form) -> tuple[str, ...]:
    """A row's texts."""
    return (form.name, f"{form.params:,}", f"{form.macs:,}", f"{form.seconds * 1e3:.2f}")


def _result(found: StreetFindings) -> str:
    score = found.score
    return (
        f"On {score.images} other scenes the mean IoU is {score.miou:.1%}, and "
        f"{score.pixel_accuracy:.1%} of the pixels are right; found best: {found.best(4)}"
    )


def print_streets(found: StreetFindings | str, console: Console) -> None:
    """Prints the table and the result; or why there is none."""
    if isinstance(found, str):
        console.print(f"ERFNet on drawn streets was left out: {found}", highlight=False)
        return
    table = Table(title="ERFNet on drawn streets", title_justify="left", box=SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for form in found.forms:
        table.add_row(*cells(form), style="dim" if form is found.forms[-1] else None)
    console.print(table)
    console.print(_result(found), highlight=False)


def streets_section(found: StreetFindings | str) -> str:
    """The page's part about ERFNet, as HTML."""
    title = "<h2>A class for every pixel</h2>"
    if isinstance(found, str):
        return f"{title}\n<p>ERFNet on drawn streets was left out: {html.escape(found)}</p>"
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    rows = "\n".join(
        ('<tr class="dense">' if form is found.forms[-1] else "<tr>")
        + "".join(f"<td>{html.escape(text)}</td>" for text in cells(form))
        + "</tr>"
        for form in found.forms
    )
    image = base64.b64encode(found.picture.read_bytes()).decode()
    return f"""{title}
<p>A narrow ERFNet learned from {SCENES} drawn street scenes of {SIZE[0]} x {SIZE[1]} pixels, its
encoder alone for {found.epochs[0]} epochs and all of it for {found.epochs[1]}. Its blocks are pairs
of one-dimensional convolutions that run as one call.</p>
<p>{html.escape(_result(found))}.</p>
<div class="wide"><table>
<caption>Task: streets, ERFNet</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p><img alt="Drawn street scenes with the classes that the network found, and the true ones"
src="data:image/png;base64,{image}"></p>"""
