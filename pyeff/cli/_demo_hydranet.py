"""The demo's HydraNet: trained on the digits, run with one to all of its branches."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from pyeff.measure import measure_latency
from pyeff.models.hydranet import HydraNet
from pyeff.train import TaskData, TrainConfig, Trainer, evaluate
from pyeff.train.branch_plots import plot_branches
from pyeff.train.gate_statistics import statistics_of

# About as many multiply-adds as the dense network, with two branches.
MODEL = {"family": "hydranet_resnet", "n_b": 5, "k": 2, "w_b": 0.5, "w_g": 0.5}
IMAGE_COUNTS = (1, 64)


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        name: what ran, in words.
        accuracy: share of test images, 0..1.
        macs: multiply-adds an image.
        seconds: number of images to the median time of such a batch.
    """

    name: str
    accuracy: float
    macs: int
    seconds: Mapping[int, float]


@dataclass(frozen=True)
class HydraFindings:
    """What the demo shows of the HydraNet.

    Attributes:
        lines: one for each number of branches, and the dense network's.
        groups: the names of the classes that each branch owns.
        gate_top1: share of test images whose class's own branch has the highest score.
        parameters: of the whole network.
        picture: which classes each branch serves.
        seconds: of training.
    """

    lines: Sequence[Line]
    groups: Sequence[Sequence[str]]
    gate_top1: float
    parameters: int
    picture: Path
    seconds: float


def study_hydranet(
    config: TrainConfig, task: TaskData, dense: Line, alone: nn.Module
) -> HydraFindings:
    """Trains a HydraNet on one task, and runs it with every number of branches.

    Args:
        config: the dense network's run, whose classifier clusters the classes.
        task: the data.
        dense: the dense network's row, without its times.
        alone: the dense network.
    """
    out = Path(config.out).with_name("hydranet")
    mine = replace(config, model=MODEL, out=str(out), partition="auto", reference=config.out)
    trainer = Trainer(mine, [task])
    result = trainer.fit(overwrite=True)
    model = cast(HydraNet, result.model)
    lines = _lines(model, task, dense, alone)
    if result.gate is None or result.gate.top1 is None:
        raise RuntimeError("demo: the gate must have been evaluated, got no statistics")
    groups = model.class_group.tolist()
    picture = out / "branches.png"
    plot_branches(result.gate.to_json(), task.class_names, picture, class_groups=groups)
    return HydraFindings(
        lines=lines,
        groups=[
            [task.class_names[c] for c, owner in enumerate(groups) if owner == branch]
            for branch in range(model.n_b)
        ],
        gate_top1=result.gate.top1,
        parameters=model.costs(task.image_shape[1:]).params,
        picture=picture,
        seconds=result.seconds,
    )


def _lines(model: HydraNet, task: TaskData, dense: Line, alone: nn.Module) -> list[Line]:
    """Accuracy, cost and time with 1, 2, ... all branches, measured in turn with the dense one."""
    counts = range(1, model.n_b + 1)
    trained_with = model.k
    accuracies = []
    for k in counts:
        model.k = k
        found = evaluate(model, [task], statistics=statistics_of(model))
        accuracies.append(found[task.name, 1])
    model.k = trained_with
    times: dict[int, list[float]] = {}
    like = next(model.parameters())
    for images in IMAGE_COUNTS:
        x = torch.randn(images, *task.image_shape, device=like.device, dtype=like.dtype)
        x = x.to(memory_format=torch.channels_last)
        runs: list[Any] = [partial(model, k=k) for k in counts]
        times[images] = measure_latency([*runs, alone.eval()], x, repeats=30, warmup=5)
    lines = [
        Line(
            f"{k} of {model.n_b}" + (" (as trained)" if k == trained_with else ""),
            accuracies[k - 1],
            model.costs(task.image_shape[1:], k=k).macs,
            {images: times[images][k - 1] for images in IMAGE_COUNTS},
        )
        for k in counts
    ]
    return [*lines, replace(dense, seconds={images: times[images][-1] for images in IMAGE_COUNTS})]


HEADINGS = ("Branches", "Accuracy", "MACs", *(f"x{images}, ms" for images in IMAGE_COUNTS))


def cells(line: Line) -> tuple[str, ...]:
    """A row's texts."""
    times = (f"{line.seconds[images] * 1e3:.2f}" for images in IMAGE_COUNTS)
    return (line.name, f"{line.accuracy:.1%}", f"{line.macs:,}", *times)


def groups_in_words(found: HydraFindings) -> str:
    """Which classes go to which branch."""
    return " · ".join(f"{branch}: {' '.join(names)}" for branch, names in enumerate(found.groups))


def print_hydranet(found: HydraFindings, console: Console) -> None:
    """Prints the table and the partition."""
    table = Table(title="HydraNet, task digit", title_justify="left", box=SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for line in found.lines:
        table.add_row(*cells(line), style="dim" if line is found.lines[-1] else None)
    console.print(table)
    console.print(f"Digits of each branch: {groups_in_words(found)}", highlight=False)
    console.print(
        f"The gate's first choice is the branch of the right digit for {found.gate_top1:.1%}",
        highlight=False,
    )


def hydranet_section(found: HydraFindings) -> str:
    """The page's part about the HydraNet, as HTML."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    rows = "\n".join(
        ('<tr class="dense">' if line is found.lines[-1] else "<tr>")
        + "".join(f"<td>{html.escape(text)}</td>" for text in cells(line))
        + "</tr>"
        for line in found.lines
    )
    image = base64.b64encode(found.picture.read_bytes()).decode()
    return f"""<h2>One network, a few branches for each image</h2>
<p>A HydraNet with {len(found.groups)} branches ({found.parameters:,} parameters) learned which
digit it sees. The dense network's outputs say which digits look alike; each branch owns a group of
them ({html.escape(groups_in_words(found))}), and a gate learns to pick branches: its first choice
is that of the right digit for {found.gate_top1:.1%} of the test images. How many run may be changed
at any time; the others compute nothing.</p>
<div class="wide"><table>
<caption>Task: digit, HydraNet</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p><img alt="For each digit, the share of its images that run each branch"
src="data:image/png;base64,{image}"></p>"""
