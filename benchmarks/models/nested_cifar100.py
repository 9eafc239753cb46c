"""A deep virtual network on CIFAR-100 beside its backbone trained alone: docs/results/nested.md.

    python benchmarks/models/nested_cifar100.py --data data --runs runs/nested --seeds 0 1 2

Trains what is not trained yet (a finished run in --runs is kept), with one recipe for all: the
nested network on fine and coarse labels, the same backbone alone on each, and the nested network
with batch norm statistics that all levels share. Then writes the picture and the numbers, and
prints the tables.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyeff.checkpoint import write_bytes_atomically
from pyeff.train import TrainConfig
from pyeff.train.evaluate import LevelResult
from pyeff.train.plots import plot_levels
from pyeff.train.report import train_and_report

TASKS = ("cifar100:fine", "cifar100:coarse")
NESTED = {"family": "dvn", "backbone": "resnet20", "levels": 4}
RECIPE: dict[str, Any] = {
    "epochs": 6,
    "limit_train": 20_000,
    "precision": "bf16",
    "eval_every": 6,
    "level_rule": "sandwich",
    "sandwich_levels": 3,
}


def configs(data: Path, runs: Path, seeds: list[int], shared: bool) -> dict[str, TrainConfig]:
    """Every run by the name of its folder."""

    def one(name: str, tasks: tuple[str, ...], model: dict[str, Any], seed: int) -> None:
        out = str(runs / name)
        known[name] = TrainConfig(
            tasks=tasks, model=model, data=str(data), out=out, seed=seed, **RECIPE
        )

    known: dict[str, TrainConfig] = {}
    for seed in seeds:
        one(f"dvn_s{seed}", TASKS, NESTED, seed)
        one(f"fine_s{seed}", TASKS[:1], {"family": "backbone", "backbone": "resnet20"}, seed)
        one(f"coarse_s{seed}", TASKS[1:], {"family": "backbone", "backbone": "resnet20"}, seed)
    if shared:
        one("dvn_shared", TASKS, {**NESTED, "norm_statistics": "shared"}, seeds[0])
    return known


def table_of(folder: Path) -> list[LevelResult]:
    """The levels of a finished run."""
    document = json.loads((folder / "results.json").read_text())
    return [LevelResult(**line) for line in document["results"]]


def averaged(tables: list[list[LevelResult]]) -> tuple[list[LevelResult], dict[str, list[float]]]:
    """Lines with the mean accuracy over seeds, and each line's accuracies in percent."""
    lines, all_of = [], {}
    for same in zip(*tables, strict=True):
        values = [100 * (line.accuracy or 0.0) for line in same]
        all_of[f"{same[0].task} level {same[0].level}"] = values
        lines.append(replace(same[0], accuracy=statistics.mean(values) / 100))
    return lines, all_of


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.2f}"


def main() -> None:
    """Trains, collects, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/nested"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-shared", action="store_true", help="without the shared statistics")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    known = configs(arguments.data, arguments.runs, arguments.seeds, not arguments.no_shared)
    for name, config in known.items():
        if not (arguments.runs / name / "results.json").exists():
            train_and_report(config, overwrite=True)

    seeds = arguments.seeds
    nested, nested_values = averaged([table_of(arguments.runs / f"dvn_s{s}") for s in seeds])
    dense, dense_values = [], {}
    for kind in ("fine", "coarse"):
        lines, values = averaged([table_of(arguments.runs / f"{kind}_s{s}") for s in seeds])
        dense += lines
        dense_values.update({lines[0].task: next(iter(values.values()))})
    shared: dict[str, float] = {}
    if not arguments.no_shared:
        for line in table_of(arguments.runs / "dvn_shared"):
            shared[f"{line.task} level {line.level}"] = 100 * (line.accuracy or 0.0)

    print("| task | level | parameters | MACs | nested, % | shared statistics, % | alone, % |")
    print("|---|---|---|---|---|---|---|")
    for line in nested:
        key = f"{line.task} level {line.level}"
        alone = spread(dense_values[line.task]) if line.level == NESTED["levels"] else ""
        collapsed = f"{shared[key]:.2f}" if key in shared else ""
        print(
            f"| {line.task} | {line.level} | {line.params:,} | {line.macs / 1e6:.2f} M "
            f"| {spread(nested_values[key])} | {collapsed} | {alone} |"
        )
    document = {
        "recipe": RECIPE,
        "model": NESTED,
        "seeds": seeds,
        "accuracy_percent": nested_values,
        "alone_percent": dense_values,
        "shared_statistics_percent": shared,
        "levels": [line.to_json() for line in nested],
    }
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / "nested_cifar100.json", text.encode())
    plot_levels(
        nested,
        arguments.out / "nested_cifar100.png",
        dense=dense,
        title=f"DVN ResNet-20 on CIFAR-100, {len(seeds)} seed(s), {RECIPE['epochs']} short epochs",
    )


if __name__ == "__main__":
    main()
