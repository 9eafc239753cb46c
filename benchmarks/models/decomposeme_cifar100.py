"""DecomposeMe on CIFAR-100 beside its dense form: docs/results/decomposeme_cifar100.*.

    python benchmarks/models/decomposeme_cifar100.py --data data --runs runs/decomposeme --seeds 0 1

Trains what is not trained yet (a finished run in --runs is kept, an interrupted one goes on), with
one recipe for all, and no choice of an epoch by the test images:

- pairs: eight pairs of a 3 x 1 and a 1 x 3 convolution;
- dense: 3 x 3 convolutions of the same widths in their place;
- narrow: dense, its widths scaled to the multiply-adds of the pairs;
- linear: the pairs without the ReLU between their members.

The network is Dec8 (see pyeff.models.decomposeme) made fit for 32 x 32 pixels, which is ours: a
quarter of its widths, and its first three poolings, so that the last three layers see 4 x 4
positions. A batch norm follows every convolution of all networks. --arms trains a part of the runs
only, for several processes; --time measures inference as well.
"""

import argparse
import io
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from decomposeme_inference import markdown_times, time_inference
from finished_runs import check_recipe, results_of
from timing import machine, markdown_table

from pyeff.checkpoint import write_bytes_atomically
from pyeff.models import decomposeme
from pyeff.train import TrainConfig
from pyeff.train.config import config_from_json
from pyeff.train.report import train_and_report
from pyeff.train.trainer import load_config_tasks

NAME = "decomposeme_cifar100"
TASK, CLASSES, SIZE = "cifar100:fine", 100, (32, 32)
ARMS = ("pairs", "dense", "narrow", "linear")
PAIR = ("pairs", "dense")
RECIPE: dict[str, Any] = {"schedule": "onecycle", "lr": 0.1, "weight_decay": 5e-4}
# How far the costs of pairs and narrow may lie apart, and what widths are multiples of.
EQUAL, GRAIN = 0.03, 8


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        data: folder of the data set.
        runs: folder of the runs.
        widths: channels of the eight layers.
        pools: numbers of the layers after which the map is halved.
        norm: where batch norms stand in a pair.
        recipe: settings of all runs.
        seeds: of pairs and dense.
        ablation_seeds: of the other arms.
    """

    data: Path
    runs: Path
    widths: tuple[int, ...]
    pools: tuple[int, ...]
    norm: str
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Which seeds an arm is trained with."""
        return self.seeds if arm in PAIR else self.ablation_seeds

    def model(self, arm: str) -> dict[str, Any]:
        """The network of an arm, as :func:`pyeff.models.build` takes it without the classes."""
        widths = narrowed(self) if arm == "narrow" else self.widths
        options: dict[str, dict[str, Any]] = {
            "dense": {"dense": True},
            "narrow": {"dense": True},
            "linear": {"inner": None},
        }
        return {
            "family": "decomposeme",
            "width": list(widths),
            "pools": list(self.pools),
            "norm": self.norm,
            **options.get(arm, {}),
        }

    def config(self, arm: str, seed: int) -> TrainConfig:
        """One run."""
        return TrainConfig(
            tasks=(TASK,),
            model=self.model(arm),
            data=str(self.data),
            out=str(self.folder(arm, seed)),
            seed=seed,
            eval_every=self.recipe["epochs"],
            **self.recipe,
        )

    def folder(self, arm: str, seed: int) -> Path:
        """Where a run is."""
        return self.runs / f"{arm}_s{seed}"


def macs_of(plan: Plan, widths: tuple[int, ...], *, dense: bool) -> int:
    """Multiply-adds of one image."""
    with torch.device("meta"):
        model = decomposeme(CLASSES, widths, pools=plan.pools, dense=dense)
    return model.costs(SIZE).macs


def narrowed(plan: Plan) -> tuple[int, ...]:
    """Widths, multiples of 8, with which the dense network costs what the pairs do.

    Raises:
        SystemExit: none comes within 3 %.
    """
    wanted = macs_of(plan, plan.widths, dense=False)

    def scaled(percent: int) -> tuple[int, ...]:
        return tuple(max(GRAIN, GRAIN * round(w * percent / 100 / GRAIN)) for w in plan.widths)

    tried = dict.fromkeys(map(scaled, range(40, 121)))
    found = {widths: macs_of(plan, widths, dense=True) for widths in tried}
    widths = min(found, key=lambda key: abs(found[key] - wanted))
    if abs(found[widths] / wanted - 1) > EQUAL:
        raise SystemExit(
            f"{NAME}: the narrow network's cost must come within {EQUAL:.0%} of {wanted:,} "
            f"multiply-adds, got {found[widths]:,}: choose other --widths"
        )
    return widths


def train(plan: Plan, arms: list[str]) -> None:
    """Trains the runs of some arms that are not finished."""
    for arm in arms:
        for seed in plan.seeds_of(arm):
            folder = plan.folder(arm, seed)
            if results_of(folder) is None:
                begun = (folder / "checkpoint.safetensors").exists()
                train_and_report(plan.config(arm, seed), resume=begun)
            else:
                finished(plan.config(arm, seed))


def finished(config: TrainConfig) -> dict[str, Any]:
    """What a finished run left.

    Raises:
        SystemExit: there is none, or it is of another recipe.
    """
    folder = Path(config.out)
    found = results_of(folder)
    if found is None:
        raise SystemExit(f"{NAME}: {folder} must hold a finished run, got none")
    check_recipe(folder, config_from_json(found["config"]).deciding(), config.deciding())
    return found


def collect(plan: Plan, arms: list[str]) -> dict[str, Any]:
    """Accuracy and cost of every arm over its seeds."""
    found: dict[str, Any] = {}
    for arm in arms:
        runs = [finished(plan.config(arm, seed)) for seed in plan.seeds_of(arm)]
        lines = [run["results"][0] for run in runs]
        found[arm] = {
            "model": plan.model(arm),
            "seeds": list(plan.seeds_of(arm)),
            "macs": lines[0]["macs"],
            "params": lines[0]["params"],
            "accuracy_percent": [100 * line["accuracy"] for line in lines],
            "training_seconds": [run["seconds"] for run in runs],
        }
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    rows = [
        [
            arm,
            f"{found['params']:,}",
            f"{found['macs'] / 1e6:.2f} M",
            len(found["seeds"]),
            spread(found["accuracy_percent"]),
            spread([seconds / 60 for seconds in found["training_seconds"]], 1),
        ]
        for arm, found in document["arms"].items()
    ]
    columns = ["network", "parameters", "MACs", "seeds", "accuracy, %", "minutes of training"]
    print(markdown_table(columns, rows))
    if document["inference"]:
        print(markdown_times(document["inference"]))


def draw(document: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds and, where it was measured, against time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = document["arms"]
    axes_of = {"multiply-adds an image, M": {arm: a["macs"] / 1e6 for arm, a in arms.items()}}
    for row in document["inference"]:
        label = f"ms an image, batch {row['images']}"
        axes_of.setdefault(label, {})[row["network"]] = row["ms_per_image"]
    figure = Figure(figsize=(1.5 + 3.5 * len(axes_of), 4.2), layout="constrained")
    # The canvas is named, so that no window system is asked for.
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for axes, (label, places) in zip(panels, axes_of.items(), strict=True):
        for index, (arm, place) in enumerate(places.items()):
            values = arms[arm]["accuracy_percent"]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            axes.errorbar(place, mean, deviation, fmt="o", capsize=4, color=f"C{index}", label=arm)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.1 * max(places.values()))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"DecomposeMe on CIFAR-100, {document['recipe']['epochs']} epochs")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes_atomically(path, picture.getvalue())


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/decomposeme"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="train these only, collect nothing")
    widths = [16, 32, 64, 64, 128, 128, 128, 128]
    parser.add_argument("--widths", type=int, nargs=8, default=widths)
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--norm", default="both", choices=("both", "outer"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--time", action="store_true", help="measure inference too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    given = vars(arguments)
    shared = ("epochs", "precision", "limit_train", "limit_test")
    return Plan(
        data=arguments.data,
        runs=arguments.runs,
        widths=tuple(arguments.widths),
        pools=tuple(arguments.pools),
        norm=arguments.norm,
        recipe={**RECIPE, **{name: given[name] for name in shared}},
        seeds=tuple(arguments.seeds),
        ablation_seeds=tuple(arguments.ablation_seeds),
    )


def main() -> None:
    """Trains, collects, draws."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments)
    arms = [arm for arm in ARMS if plan.seeds_of(arm)]
    train(plan, arguments.arms or arms)
    if arguments.arms:
        return
    document: dict[str, Any] = {
        "machine": machine(),
        "recipe": plan.recipe,
        "arms": collect(plan, arms),
        "inference": [],
    }
    if arguments.time:
        (task,) = load_config_tasks(plan.config(arms[0], plan.seeds[0]))
        folders = {arm: plan.folder(arm, plan.seeds_of(arm)[0]) for arm in arms}
        document["inference"] = time_inference(folders, task, arguments.threads)
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{NAME}.json", text.encode())
    draw(document, arguments.out / f"{NAME}.png")
    print_tables(document)


if __name__ == "__main__":
    main()
