"""From finished runs to numbers, tables and pictures. Part of the compression scripts."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression_arms import PENALTIES, Arm, Plan, made_of
from timing import markdown_table

from pyeff.train.compression_plots import (
    SizePoint,
    plot_accuracy_against_parameters,
    plot_neurons,
    plot_per_epoch,
)
from pyeff.train.picture import new_figure, write_picture


def collect(plan: Plan) -> dict[str, Any]:
    """What every arm's runs left behind, a list entry for each seed.

    Raises:
        FileNotFoundError: a run is missing.
    """
    found: dict[str, Any] = {}
    for arm in plan.arms:
        seeds = plan.seeds_of(arm)
        if not seeds:
            continue
        folders = [plan.folder(arm, seed) for seed in seeds]
        runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
        lines = [run["results"][0] for run in runs]
        found[arm.name] = {
            "kind": arm.kind,
            "target": arm.target,
            "epoch": arm.epoch,
            "seeds": list(seeds),
            "params": [line["params"] for line in lines],
            "macs": [line["macs"] for line in lines],
            "accuracy_percent": [100 * line["accuracy"] for line in lines],
            "class_mean_percent": [100 * line["class_mean"] for line in lines],
            "seconds": [run["seconds"] for run in runs],
            "compression": [_compression(plan, arm, seed) for seed in seeds],
        }
    return found


def _compression(plan: Plan, arm: Arm, seed: int) -> dict[str, Any] | None:
    """What compression left; a run that starts from another's small network has that one's."""
    path = plan.folder(arm, seed) / "compression.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    if arm.kind not in ("tuned", "small"):
        return None
    (source,) = made_of(plan, arm, seed)
    found = json.loads((source / "compression.json").read_text())
    # How it came there is the other run's.
    return {**found, "live": {}, "ranks": {}}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def neurons(found: dict[str, Any]) -> tuple[float, float] | None:
    """An arm's neurons before and after, summed over layers, the mean over seeds."""
    sizes = [run["channels"].values() for run in found["compression"] if run and run["channels"]]
    if not sizes:
        return None
    counts = [(sum(s[0] for s in layers), sum(s[1] for s in layers)) for layers in sizes]
    return statistics.mean(b for b, _ in counts), statistics.mean(a for _, a in counts)


def print_arms(arms: dict[str, Any]) -> None:
    """Markdown: an arm in each line."""
    rows = []
    for name, found in arms.items():
        count = neurons(found)
        rows.append(
            [
                name,
                f"{statistics.mean(found['params']):,.0f}",
                f"{statistics.mean(found['macs']) / 1e6:.2f} M",
                "" if count is None else f"{1 - count[1] / count[0]:.0%}",
                len(found["seeds"]),
                spread(found["accuracy_percent"]),
                spread(found["class_mean_percent"]),
                spread([seconds / 60 for seconds in found["seconds"]], 1),
            ]
        )
    columns = ["network", "parameters", "MACs", "neurons removed", "seeds", "accuracy, %"]
    print(markdown_table([*columns, "mean over classes, %", "minutes"], rows))


def draw_accuracy(arms: dict[str, Any], path: Path, title: str) -> None:
    """Accuracy against parameters: a line a kind of arm, a point a target or epoch."""
    lines: dict[str, list[SizePoint]] = {}
    for found in arms.values():
        values = [value / 100 for value in found["accuracy_percent"]]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        params = round(statistics.mean(found["params"]))
        point = SizePoint(params, statistics.mean(values), deviation)
        trained_on = found["kind"] in PENALTIES and found["epoch"] is not None
        line = f"{found['kind']}, then trained on" if trained_on else found["kind"]
        lines.setdefault(line, []).append(point)
    plot_accuracy_against_parameters(lines, path, title=title)


def draw_layers(arms: dict[str, Any], arm: Arm, stem: Path) -> list[Path]:
    """Neurons of each layer before and after, and ranks and live neurons after each epoch.

    Args:
        arms: of :func:`collect`.
        arm: whose first seed is drawn.
        stem: of the pictures' names.

    Returns:
        The pictures that were written: those for which the run has figures.
    """
    run = arms[arm.name]["compression"][0]
    written: list[Path] = []
    if run is None:
        return written
    if run["channels"]:
        before = {name: sizes[0] for name, sizes in run["channels"].items()}
        after = {name: sizes[1] for name, sizes in run["channels"].items()}
        written.append(stem.with_name(f"{stem.name}_neurons.png"))
        plot_neurons(before, after, written[-1])
    for key, label in (("ranks", "rank"), ("live", "live neurons")):
        if run[key]:
            counts = {int(epoch): layers for epoch, layers in run[key].items()}
            written.append(stem.with_name(f"{stem.name}_{key}.png"))
            plot_per_epoch(counts, written[-1], label=label)
    return written


def draw_times(arms: dict[str, Any], path: Path, title: str) -> None:
    """Wall time of every arm's training, with its accuracy beside the bar."""
    names = list(arms)
    figure = new_figure(7, 1.2 + 0.32 * len(names))
    axes = figure.subplots()
    minutes = [statistics.mean(arms[name]["seconds"]) / 60 for name in names]
    axes.barh(range(len(names)), minutes, color="C0")
    for at, name in enumerate(names):
        words = f" {spread(arms[name]['accuracy_percent'], 1)} %"
        axes.text(minutes[at], at, words, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(max(minutes), 1e-6))
    axes.set_xlabel("minutes of training; beside the bars the test accuracy")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    write_picture(figure, path)
