"""What the demo found, as a picture, a table in the terminal and a page of HTML."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pyeff._extras import require
from pyeff.checkpoint import write_bytes_atomically


@dataclass(frozen=True)
class Row:
    """One network on one task.

    Attributes:
        task: name.
        network: "level 1" and so on, or "dense".
        params: parameters in use.
        macs: multiply-adds an image.
        latency_s: seconds for one image, run as it was trained.
        plain_latency_s: the same for the level taken out as a plain network; ``None`` for the
            dense network, which is plain already.
        accuracy: share of test images, 0..1.
    """

    task: str
    network: str
    params: int
    macs: int
    latency_s: float
    plain_latency_s: float | None
    accuracy: float

    @property
    def dense(self) -> bool:
        return self.network == "dense"


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
        rows: networks, tasks one after the other, the dense one last.
        choices: one a task.
        budget: in words, such as "100,000 parameters".
        recipe: what was trained, in a sentence.
        machine: where, in a sentence.
    """

    rows: Sequence[Row]
    choices: Sequence[Choice]
    budget: str
    recipe: str
    machine: str

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))


HEADINGS = (
    "Network",
    "Accuracy",
    "Parameters",
    "MACs",
    "Latency, nested",
    "Latency, as plain",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts, in the order of HEADINGS."""
    nested = "-" if row.dense else _milliseconds(row.latency_s)
    plain = row.latency_s if row.plain_latency_s is None else row.plain_latency_s
    return (
        "dense, trained alone" if row.dense else row.network,
        f"{row.accuracy:.1%}",
        f"{row.params:,}",
        f"{row.macs:,}",
        nested,
        _milliseconds(plain),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def print_findings(findings: Findings, console: Console) -> None:
    """Prints one table a task, and the choice for the budget."""
    for task in findings.tasks:
        table = Table(title=f"task {task}", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
        for row in (row for row in findings.rows if row.task == task):
            table.add_row(*cells(row), style="dim" if row.dense else None)
        console.print(table)
    console.print(f"Budget: {findings.budget}")
    for choice in findings.choices:
        console.print(f"  {_choice_words(choice)}", highlight=False)


def _choice_words(choice: Choice) -> str:
    return (
        f"{choice.task}: level {choice.level} fits ({choice.params:,} parameters, "
        f"{choice.macs:,} MACs, {choice.accuracy:.1%}); as a plain network its outputs differ by "
        f"at most {choice.difference:.1e}"
    )


def draw(findings: Findings, path: Path) -> None:
    """Draws accuracy against parameters and against MACs, a line a task.

    Args:
        findings: what to draw.
        path: a PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib_figure = require("matplotlib.figure", "train", "to draw plots")
    figure = matplotlib_figure.Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colors = ["#1b6ca8", "#c8553d", "#4f772d", "#6d4c91"]
    for axis, quantity, label in (
        (axes[0], "params", "parameters (thousands)"),
        (axes[1], "macs", "MACs an image (thousands)"),
    ):
        for task, color in zip(findings.tasks, colors * len(findings.tasks), strict=False):
            points = [
                (getattr(row, quantity) / 1e3, 100 * row.accuracy, row.dense)
                for row in findings.rows
                if row.task == task
            ]
            nested = [(x, y) for x, y, dense in points if not dense]
            axis.plot(*zip(*nested, strict=True), "o-", color=color, label=f"{task}, nested levels")
            for x, y, dense in points:
                if dense:
                    axis.plot(
                        x, y, "D", ms=9, mfc="none", mew=1.6, color=color, label=f"{task}, dense"
                    )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 56rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.quiet { color: #5a5a5a; } .wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .8rem 0 .3rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #999; } tr.dense { color: #5a5a5a; font-style: italic; }
tr.chosen td:first-child::after { content: " ◂ fits budget"; color: #1b6ca8;
                                      white-space: nowrap; }
code { background: #f2f2f2; padding: .1rem .3rem; border-radius: 3px; }
""".strip()


def write_report(findings: Findings, picture: Path, path: Path) -> None:
    """Writes one HTML file that needs no other: style and picture are inside.

    Args:
        findings: what to show.
        picture: the PNG that :func:`draw` made.
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
<title>pyeff demo: one set of weights, several networks</title>
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
<p class="quiet">Latency: median for one image. MACs are multiply-adds.</p>
<h2>Accuracy against cost</h2>
<p><img alt="Test accuracy against parameters and MACs, for every level and the dense network"
src="data:image/png;base64,{image}"></p>
<h2>A budget of {html.escape(findings.budget)}</h2>
<p><code>model.pick</code> takes the largest level that fits; <code>model.materialise</code> takes
that level out as a plain network of torch layers.</p>
<ul>
{choices}
</ul>
</body>
</html>
"""
    write_bytes_atomically(path, page.encode())


def _html_table(findings: Findings, task: str) -> str:
    chosen = {f"level {c.level}" for c in findings.choices if c.task == task}
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    lines = []
    for row in (row for row in findings.rows if row.task == task):
        kind = "dense" if row.dense else "chosen" if row.network in chosen else ""
        mark = f' class="{kind}"' if kind else ""
        data = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        lines.append(f"<tr{mark}>{data}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<caption>Task: {html.escape(task)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )
