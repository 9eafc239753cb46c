"""HydraNets on CIFAR-100 beside static ResNets of equal cost: docs/results/hydranet.md.

    python benchmarks/models/hydranet_cifar100.py --data data --runs runs/hydranet --seeds 0 1 2

Trains what is not trained yet (a finished run in --runs is kept), with one recipe for all: the
static network, the HydraNet of equal multiply-adds with its classes clustered by that static
network's outputs, with a random partition, and with a gate learned from the task's loss; and larger
static networks. Then evaluates the HydraNets with every number of branches, writes the numbers and
the pictures, and prints the tables. --arms trains a part of the runs only, for several processes;
--time measures inference as well.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hydranet_inference import markdown_times, time_inference
from timing import machine, markdown_table

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.models.hydranet import HydraNet
from pyeff.train import TaskData, TrainConfig, evaluate, load_config_tasks
from pyeff.train.branch_plots import plot_branches
from pyeff.train.evaluate import LevelResult
from pyeff.train.gate_statistics import statistics_of
from pyeff.train.plots import plot_levels
from pyeff.train.report import train_and_report

TASK = "cifar100:fine"
# Blocks of all networks are post-activation: their batch norms can be folded into convolutions.
FORM = {"preactivation": False}
HYDRANET: dict[str, Any] = {
    "family": "hydranet_resnet",
    "n_b": 20,
    "k": 4,
    "w_s": 1.0,
    "w_b": 1.0,
    "w_g": 1.0,
    "d": 1,
    **FORM,
}
GATE_SETTINGS = ("branch_mean", "gate_loss_weight", "teacher_forcing_epochs")
RECIPE: dict[str, Any] = {
    "epochs": 10,
    "precision": "bf16",
    "schedule": "onecycle",
    "lr": 0.1,
    "weight_decay": 5e-4,
}
HYDRA_ARMS = ("clustered", "random", "learn")
# How far the pair's costs may lie apart.
EQUAL = 0.03


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        data: folder of the data set.
        runs: folder of the runs.
        static: backbones; the first one has the HydraNet's cost.
        hydranet: the HydraNet's configuration.
        recipe: settings of all runs.
        seeds: of the first static network and the clustered HydraNet.
        ablation_seeds: of the other arms.
        hydra_recipe: settings of the HydraNets' training alone.
        widths: channels of the three stages of all networks.
    """

    data: Path
    runs: Path
    static: tuple[str, ...]
    hydranet: dict[str, Any]
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    hydra_recipe: dict[str, Any]
    widths: tuple[int, ...]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Which seeds an arm is trained with."""
        return self.seeds if arm in (self.static[0], "clustered") else self.ablation_seeds

    def config(self, arm: str, seed: int) -> TrainConfig:
        """One run."""
        settings: dict[str, Any] = {}
        if arm in HYDRA_ARMS:
            model = {**self.hydranet, "widths": list(self.widths)}
            settings["partition"] = "auto" if arm == "clustered" else "random"
            settings.update(self.hydra_recipe)
            if arm == "learn":
                model["gate"] = "learn"
            elif arm == "clustered":
                settings["reference"] = str(self.runs / f"{self.static[0]}_s{seed}")
        else:
            widths = list(self.widths)
            model = {"family": "backbone", "backbone": arm, "widths": widths, **FORM}
        return TrainConfig(
            tasks=(TASK,),
            model=model,
            data=str(self.data),
            out=str(self.runs / f"{arm}_s{seed}"),
            seed=seed,
            **{"eval_every": self.recipe["epochs"], **self.recipe, **settings},
        )

    def folder(self, arm: str, seed: int) -> Path:
        """Where a run is."""
        return self.runs / f"{arm}_s{seed}"


def train(plan: Plan, arms: list[str]) -> None:
    """Trains the runs that are not finished, static networks first: they cluster the classes."""
    for arm in sorted(arms, key=lambda a: a in HYDRA_ARMS):
        for seed in plan.seeds_of(arm):
            folder = plan.folder(arm, seed)
            if (folder / "results.json").exists():
                continue
            begun = (folder / "checkpoint.safetensors").exists()
            train_and_report(plan.config(arm, seed), resume=begun)


def line_of(folder: Path) -> LevelResult:
    """The result of a finished run."""
    document = json.loads((folder / "results.json").read_text())
    (line,) = document["results"]
    return LevelResult(**line)


def finished(plan: Plan, arm: str) -> list[int]:
    """The seeds that were asked for, and those of the pair that an earlier call has trained."""
    return sorted(
        seed
        for seed in {*plan.seeds_of(arm), *plan.seeds}
        if (plan.folder(arm, seed) / "results.json").exists()
    )


def collect(plan: Plan, arms: list[str]) -> dict[str, Any]:
    """Accuracy and cost of every arm over its seeds, and the gate's figures."""
    found: dict[str, Any] = {}
    for arm in arms:
        seeds = finished(plan, arm)
        lines = [line_of(plan.folder(arm, seed)) for seed in seeds]
        gates = [line.gate for line in lines if line.gate is not None]
        found[arm] = {
            "seeds": seeds,
            "macs": lines[0].macs,
            "params": lines[0].params,
            "accuracy_percent": [100 * (line.accuracy or 0.0) for line in lines],
            "gate": [{k: g[k] for k in ("top1", "topk", "entropy", "dead", "use")} for g in gates],
        }
    return found


def check_equal(plan: Plan, arms: dict[str, Any]) -> None:
    """Fails unless the pair's costs are equal within 3 %."""
    static = arms[plan.static[0]]["macs"]
    for arm in HYDRA_ARMS:
        if arm in arms and abs(arms[arm]["macs"] / static - 1) > EQUAL:
            raise SystemExit(
                f"hydranet_cifar100: costs must be equal within {EQUAL:.0%}, got "
                f"{arms[arm]['macs']:,} ({arm}) and {static:,} ({plan.static[0]})"
            )


def over_k(plan: Plan, task: TaskData, arm: str) -> list[dict[str, Any]]:
    """A trained HydraNet with other numbers of branches than it was trained with."""
    rows: list[dict[str, Any]] = []
    models = [cast(HydraNet, pyeff.load(plan.folder(arm, s))) for s in plan.seeds_of(arm)]
    for k in sorted({1, 2, 3, plan.hydranet["k"], 6, 8, 12, plan.hydranet["n_b"]}):
        accuracies, choices = [], []
        for model in models:
            model.k = k
            statistics = statistics_of(model)
            found = evaluate(model, [task], statistics=statistics)
            accuracies.append(100 * found[task.name, 1])
            choices.append(statistics.summary().topk)
        rows.append(
            {
                "k": k,
                "macs": models[0].costs().macs,
                "accuracy_percent": accuracies,
                "topk": choices,
            }
        )
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.2f}"


def print_tables(plan: Plan, document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    rows = []
    for arm, found in document["arms"].items():
        gates = found["gate"]

        def share(key: str, gates: list[dict[str, Any]] = gates) -> str:
            values = [100 * g[key] for g in gates if g[key] is not None]
            return spread(values) if values else ""

        dead = " ".join(str(len(g["dead"])) for g in gates)
        cells = [f"{found['macs'] / 1e6:.2f} M", f"{found['params']:,}", len(found["seeds"])]
        accuracy = spread(found["accuracy_percent"])
        rows.append([arm, *cells, accuracy, share("top1"), share("topk"), share("entropy"), dead])
    columns = ["network", "MACs", "parameters", "seeds", "accuracy, %", "gate top-1, %"]
    print(markdown_table([*columns, "gate top-k, %", "entropy, %", "dead"], rows))
    rows = [
        [row["k"], f"{row['macs'] / 1e6:.2f} M", spread(row["accuracy_percent"])]
        for row in document["over_k"]
    ]
    print(markdown_table(["k (clustered)", "MACs", "accuracy, %"], rows))
    if document["inference"]:
        print(markdown_times(document["inference"]))


def draw(plan: Plan, document: dict[str, Any], task: TaskData, out: Path) -> None:
    """Accuracy against cost, and which classes each branch serves."""

    def point(name: str, macs: int, params: int, values: list[float], level: int) -> LevelResult:
        return LevelResult(name, level, statistics.mean(values) / 100, params, macs, 0, 0)

    arms = document["arms"]
    points = [
        point("static ResNet", a["macs"], a["params"], a["accuracy_percent"], int(name[6:]))
        for name, a in arms.items()
        if name in plan.static
    ]
    params = arms["clustered"]["params"]
    name = f"HydraNet, k of {plan.hydranet['n_b']} (trained with {plan.hydranet['k']})"
    points += [
        point(name, row["macs"], params, row["accuracy_percent"], row["k"])
        for row in document["over_k"]
    ]
    seeds = len(arms["clustered"]["seeds"])
    title = f"CIFAR-100, {plan.recipe['epochs']} epochs, {seeds} seed(s): static depth, branches k"
    plot_levels(points, out / "hydranet_cifar100.png", title=title)
    folder = plan.folder("clustered", plan.seeds[0])
    gate = line_of(folder).gate
    if gate is None:
        raise SystemExit(f"hydranet_cifar100: {folder} must hold the gate's statistics, got none")
    plot_branches(
        gate,
        task.class_names,
        out / "hydranet_branches.png",
        class_groups=json.loads((folder / "partition.json").read_text())["class_groups"],
        title="Share of each class's test images that run each branch",
    )


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/hydranet"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--static", nargs="+", default=["resnet14", "resnet20", "resnet26"])
    parser.add_argument("--arms", nargs="*", help="train these only, and collect nothing")
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--precision", default=RECIPE["precision"])
    parser.add_argument("--branch-mean", default="routed", choices=("batch", "routed"))
    parser.add_argument("--gate-loss-weight", type=float, default=1.0)
    parser.add_argument("--teacher-forcing-epochs", type=int, default=0)
    for name in ("n-b", "k", "d"):
        parser.add_argument(f"--{name}", type=int, default=HYDRANET[name.replace("-", "_")])
    for name in ("w-s", "w-b", "w-g"):
        parser.add_argument(f"--{name}", type=float, default=HYDRANET[name.replace("-", "_")])
    parser.add_argument("--widths", type=int, nargs=3, default=[16, 32, 64])
    parser.add_argument("--time", action="store_true", help="measure inference too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    named: Callable[[str], Any] = vars(arguments).__getitem__
    recipe = {k: named(k) for k in ("epochs", "precision", "limit_train", "limit_test")}
    return Plan(
        data=arguments.data,
        runs=arguments.runs,
        static=tuple(arguments.static),
        hydranet={**HYDRANET, **{k: named(k) for k in ("n_b", "k", "d", "w_s", "w_b", "w_g")}},
        recipe={**RECIPE, **recipe},
        seeds=tuple(arguments.seeds),
        ablation_seeds=tuple(arguments.ablation_seeds),
        hydra_recipe={k: named(k) for k in GATE_SETTINGS},
        widths=tuple(arguments.widths),
    )


def main() -> None:
    """Trains, collects, draws."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments)
    train(plan, arguments.arms or [*plan.static, *HYDRA_ARMS])
    if arguments.arms:
        return
    arms = [a for a in (*plan.static, *HYDRA_ARMS) if plan.seeds_of(a)]
    (task,) = load_config_tasks(plan.config(plan.static[0], plan.seeds[0]))
    found = collect(plan, arms)
    check_equal(plan, found)
    document: dict[str, Any] = {
        "machine": machine(),
        "recipe": plan.recipe,
        "hydranet": plan.hydranet,
        "arms": found,
        "over_k": over_k(plan, task, "clustered"),
        "inference": [],
    }
    if arguments.time:
        folders = {arm: plan.folder(arm, plan.seeds_of(arm)[0]) for arm in plan.static}
        folders["clustered"] = plan.folder("clustered", plan.seeds[0])
        document["inference"] = time_inference(folders, task, arguments.threads)
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / "hydranet_cifar100.json", text.encode())
    draw(plan, document, task, arguments.out)
    print_tables(plan, document)


if __name__ == "__main__":
    main()
