"""What the demo found, as tables in the terminal and as a page of HTML."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, JustifyMethod
from rich.table import Table

from pyeff.checkpoint import write_bytes_atomically
from pyeff.cli._demo_erfnet import StreetFindings, print_streets, streets_section
from pyeff.cli._demo_hydranet import HydraFindings, hydranet_section, print_hydranet
from pyeff.train import LevelResult


@dataclass(frozen=True)
class Choice:
    """The level that a budget allows for one task.

    Attributes:
        task: name.
        level: from 1.
        params: parameters of that level.
        macs: multiply-adds an image.
        accuracy: share of test images, 0..1.
        difference: largest difference between the outputs of the nested network at this level
            and of the plain network taken out of it, over the test images.
    """

    task: str
    level: int
    params: int
    macs: int
    accuracy: float
    difference: float


@dataclass(frozen=True)
class Findings:
    """Everything that the demo shows.

    Attributes:
        nested: every task and level.
        dense: for every task the plain backbone, trained alone.
        seconds: (task, level, images) to the median time of a batch by the nested network at this
            level, and by that level taken out as a plain network. Level 0 is the dense network.
        choices: one a task.
        budget: in words, such as "30,000 parameters".
        recipe: what was trained, in a sentence.
        machine: where, in a sentence.
        hydranet: the HydraNet's part.
        streets: ERFNet's part, or why there is none.
    """

    nested: Sequence[LevelResult]
    dense: Sequence[LevelResult]
    seconds: Mapping[tuple[str, int, int], tuple[float | None, float]]
    choices: Sequence[Choice]
    budget: str
    recipe: str
    machine: str
    hydranet: HydraFindings
    streets: StreetFindings | str

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(result.task for result in self.nested))

    def chosen(self, task: str) -> int:
        """The level that the budget allows."""
        return next(choice.level for choice in self.choices if choice.task == task)


TIMES = "x1: one image; x64: 64 images at once; nested: as a level; plain: that level taken out"
# Batches that are timed: one image shows the cost of calls, many show that of arithmetic.
BATCHES = (1, 64)
HEADINGS = (
    "Network",
    "Accuracy",
    "Parameters",
    "MACs",
    *(f"{form} x{images}, ms" for images in BATCHES for form in ("Nested", "Plain")),
)


def rows(findings: Findings, task: str) -> list[tuple[str, tuple[str, ...]]]:
    """A task's table: for each row its kind ("", "chosen", "dense") and the texts of its cells."""
    table = []
    for result in (r for r in findings.nested if r.task == task):
        kind = "chosen" if result.level == findings.chosen(task) else ""
        table.append((kind, _cells(findings, f"level {result.level}", result, result.level)))
    for result in (r for r in findings.dense if r.task == task):
        table.append(("dense", _cells(findings, "dense, alone", result, 0)))
    return table


def _cells(findings: Findings, name: str, result: LevelResult, level: int) -> tuple[str, ...]:
    accuracy = "-" if result.accuracy is None else f"{result.accuracy:.1%}"
    times = (s for images in BATCHES for s in findings.seconds[result.task, level, images])
    shown = ("-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in times)
    return (name, accuracy, f"{result.params:,}", f"{result.macs:,}", *shown)


def print_findings(findings: Findings, console: Console) -> None:
    """Prints one table a task, and the choice for the budget."""
    styles = {"": None, "chosen": "bold", "dense": "dim"}
    for task in findings.tasks:
        table = Table(title=f"task {task}", title_justify="left", box=SIMPLE, padding=(0, 0, 0, 1))
        for heading in HEADINGS:
            side: JustifyMethod = "left" if heading == HEADINGS[0] else "right"
            table.add_column(heading.replace(" x", "\nx"), justify=side)
        for kind, texts in rows(findings, task):
            table.add_row(*texts, style=styles[kind])
        console.print(table)
    console.print(TIMES)
    console.print(f"Budget: {findings.budget}", highlight=False)
    for choice in findings.choices:
        console.print(f"  {_choice_words(choice)}", highlight=False)
    print_hydranet(findings.hydranet, console)
    print_streets(findings.streets, console)


def _choice_words(choice: Choice) -> str:
    return (
        f"{choice.task}: level {choice.level} fits ({choice.params:,} parameters, "
        f"{choice.macs:,} MACs, {choice.accuracy:.1%}); as a plain network its outputs differ by "
        f"at most {choice.difference:.1e}"
    )


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.quiet { color: #5a5a5a; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .8rem 0 .3rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left;
       white-space: nowrap; }
th { border-bottom: 2px solid #999; } tr.dense { color: #5a5a5a; font-style: italic; }
tr.chosen td:first-child::after { content: " ◂ fits budget"; color: #1b6ca8;
                                      white-space: nowrap; }
code { background: #f2f2f2; padding: .1rem .3rem; border-radius: 3px; }
""".strip()


def write_report(findings: Findings, picture: Path, path: Path) -> None:
    """Writes one HTML file that needs no other: style and picture are inside.

    Args:
        findings: what to show.
        picture: a PNG of accuracy against cost.
        path: the file to write.
    """
    image = base64.b64encode(picture.read_bytes()).decode()
    tables = "\n".join(_html_table(findings, task) for task in findings.tasks)
    choices = "\n".join(f"<li>{html.escape(_choice_words(c))}</li>" for c in findings.choices)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyeff demo: networks that do less work per image</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>One set of weights, several networks</h1>
<p class="quiet">{html.escape(findings.machine)}</p>
<p>{html.escape(findings.recipe)} A level uses a part of the weights; all levels and tasks were
trained together. The dense network is the plain backbone, trained alone on one task with the same
recipe.</p>
<h2>What each level costs and gives</h2>
{tables}
<p class="quiet">MACs are multiply-adds, for one image. Times are medians, for one image (x1) and
for 64 at once (x64): "nested" runs a level inside the network that holds all of them, "plain" runs
it taken out as a network of torch layers. Images of 8 x 8 pixels are so small that one of them
costs calls rather than arithmetic.</p>
<h2>Accuracy against cost</h2>
<p><img alt="Test accuracy against parameters and MACs, for every level and the dense network"
src="data:image/png;base64,{image}"></p>
<h2>A budget of {html.escape(findings.budget)}</h2>
<p><code>model.pick</code> takes the largest level that fits; <code>model.materialise</code> takes
that level out as a plain network of torch layers.</p>
<ul>
{choices}
</ul>
{hydranet_section(findings.hydranet)}
{streets_section(findings.streets)}
</body>
</html>
"""
    write_bytes_atomically(path, page.encode())


def _html_table(findings: Findings, task: str) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    lines = []
    for kind, texts in rows(findings, task):
        mark = f' class="{kind}"' if kind else ""
        data = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        lines.append(f"<tr{mark}>{data}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<caption>Task: {html.escape(task)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )
