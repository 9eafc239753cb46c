"""ExpandNets' SmallNet on CIFAR: docs/results/expandnets_cifar100.* or expandnets_cifar10.*.

    python benchmarks/models/expandnets_cifar.py --data data --task cifar100:fine \
        --runs runs/expandnets --seeds 0 1 2 3 4

Trains what is not trained yet (a finished run in --runs is kept, an interrupted one goes on), with
one recipe for all: the paper's by default (SGD with momentum 0.9, no weight decay, batches of 128,
150 epochs at rates 0.01, 0.001 and 0.0001 for a third each), but for its optimiser that starts anew
with every epoch. The arms:

- baseline: SmallNet as it is;
- fc: its first linear layer as three, without anything between them;
- cl: each convolution as 1 x 1, k x k, 1 x 1;
- ck: each convolution as 3 x 3 ones;
- cl_fc, ck_fc: both;
- ck_init (if it is asked for): ck from the weights of the same network with a ReLU between members,
  trained before by the same recipe.

Accuracy is told of the last epoch, and of the epoch that is best by the test images, as the paper
does it. --train-only lets several processes train different --arms and --seeds; --collect-only
takes the runs that are finished.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from expandnets_figure import draw
from expandnets_times import markdown_inference, markdown_steps, time_inference, time_steps
from finished_runs import check_recipe, results_of
from timing import machine, markdown_table

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.convert import contract_with_report
from pyeff.train import TrainConfig
from pyeff.train.batches import normalise
from pyeff.train.config import config_from_json
from pyeff.train.report import train_and_report
from pyeff.train.trainer import load_config_tasks

ARMS = {
    "baseline": None,
    "fc": "fc",
    "cl": "cl",
    "ck": "ck",
    "cl_fc": "cl+fc",
    "ck_fc": "ck+fc",
    "ck_init": "ck",
}
DEFAULT_ARMS = [arm for arm in ARMS if arm != "ck_init"]
# Of a run that comes before the arm's own.
BEFORE = {"ck_init": "ck_relu"}
RECIPE: dict[str, Any] = {"schedule": "thirds", "momentum": 0.9, "nesterov": False}


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        task: ``cifar100:fine`` or ``cifar10``.
        data: folder of the data set.
        runs: folder of the runs.
        model: options of the network that all arms share.
        recipe: settings of all runs.
        seeds: of every arm.
        collect_only: take what is finished.
    """

    task: str
    data: Path
    runs: Path
    model: dict[str, Any]
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    collect_only: bool

    @property
    def name(self) -> str:
        """Of the results."""
        suffix = "" if self.model["kernel"] == 7 else f"_kernel{self.model['kernel']}"
        return f"expandnets_{self.task.partition(':')[0]}{suffix}"

    def config(self, arm: str, seed: int, *, before: bool = False) -> TrainConfig:
        """One run; ``before`` asks for the one that an arm starts from."""
        model = {"family": "smallnet", **self.model, "expand": ARMS[arm]}
        if before:
            model["activation"] = "relu"
        starts = arm in BEFORE and not before
        return TrainConfig(
            tasks=(self.task,),
            model=model,
            data=str(self.data),
            out=str(self.folder(arm, seed, before=before)),
            seed=seed,
            init_from=str(self.folder(arm, seed, before=True)) if starts else None,
            **self.recipe,
        )

    def folder(self, arm: str, seed: int, *, before: bool = False) -> Path:
        """Where a run is."""
        return self.runs / f"{BEFORE[arm] if before else arm}_s{seed}"

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Which seeds of an arm count.

        Raises:
            SystemExit: none is finished.
        """
        if not self.collect_only:
            return self.seeds
        done = tuple(s for s in self.seeds if results_of(self.folder(arm, s)) is not None)
        if not done:
            raise SystemExit(
                f"{self.name}: {arm} must have a finished run, got none in {self.runs}"
            )
        return done


def train(plan: Plan, arms: list[str]) -> None:
    """Trains the runs of some arms that are not finished, a seed of all of them at a time."""
    for seed in plan.seeds:
        for arm in arms:
            for before in [True, False] if arm in BEFORE else [False]:
                config = plan.config(arm, seed, before=before)
                folder = Path(config.out)
                if results_of(folder) is None:
                    begun = (folder / "checkpoint.safetensors").exists()
                    train_and_report(config, resume=begun)
                else:
                    finished(plan, config)


def finished(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """What a finished run left.

    Raises:
        SystemExit: there is none, or it is of another recipe.
    """
    found = results_of(Path(config.out))
    if found is None:
        raise SystemExit(f"{plan.name}: {config.out} must hold a finished run, got none")
    check_recipe(Path(config.out), config_from_json(found["config"]).deciding(), config.deciding())
    return found


def collect(plan: Plan, arms: list[str]) -> dict[str, Any]:
    """Accuracy and cost of every arm over its seeds."""
    found: dict[str, Any] = {}
    for arm in arms:
        seeds = plan.seeds_of(arm)
        runs = [finished(plan, plan.config(arm, seed)) for seed in seeds]
        lines = [run["results"][0] for run in runs]
        best = [run["best_epochs"][0] for run in runs]
        found[arm] = {
            "model": plan.config(arm, seeds[0]).model,
            "seeds": list(seeds),
            "params": lines[0]["params"],
            "macs": lines[0]["macs"],
            "last_percent": [100 * line["accuracy"] for line in lines],
            "best_percent": [100 * epoch["accuracy"] for epoch in best],
            "best_epoch": [epoch["epoch"] for epoch in best],
            "training_seconds": [run["seconds"] for run in runs],
            "curves_percent": [_curve(plan.folder(arm, seed)) for seed in seeds],
        }
    return found


def _curve(folder: Path) -> list[float]:
    """Test accuracy after each epoch."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [100 * json.loads(line)["test_accuracy"] for line in lines]


def gaps(arms: dict[str, Any]) -> dict[str, Any]:
    """How much better each arm is than the baseline, with the standard error of the difference."""
    found: dict[str, Any] = {}
    for arm in [name for name in arms if name != "baseline" and "baseline" in arms]:
        found[arm] = {}
        for which in ("last_percent", "best_percent"):
            ours, theirs = arms[arm][which], arms["baseline"][which]
            errors = [statistics.variance(v) / len(v) for v in (ours, theirs) if len(v) > 1]
            found[arm][which] = {
                "mean": statistics.mean(ours) - statistics.mean(theirs),
                "standard_error": math.sqrt(sum(errors)) if len(errors) == 2 else None,
            }
    return found


def contractions(plan: Plan, arms: list[str]) -> dict[str, Any]:
    """What every arm's first network is once it is contracted, and how far its outputs move.

    Raises:
        SystemExit: one is another module than the baseline.
    """
    found: dict[str, Any] = {}
    plain = None
    for arm in arms:
        seed = plan.seeds_of(arm)[0]
        (task,) = load_config_tasks(plan.config(arm, seed))
        images = normalise(task.test_images[:64], task.mean, task.std)
        model = pyeff.load(plan.folder(arm, seed))
        small, report = contract_with_report(model, images)
        plain = plain or str(small)
        if str(small) != plain:
            raise SystemExit(f"{plan.name}: {arm} must contract to {plain}, got {small}")
        before, after = report.parameters
        found[arm] = {
            "parameters_in_training": before,
            "parameters_at_run_time": after,
            "largest_relative_difference": report.relative,
        }
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    rows = []
    for arm, found in document["arms"].items():
        gap = document["gaps"].get(arm, {}).get("last_percent")
        error = (
            "" if not gap or gap["standard_error"] is None else f" +- {gap['standard_error']:.2f}"
        )
        rows.append(
            [
                arm,
                f"{document['contractions'][arm]['parameters_in_training']:,}",
                f"{found['params']:,}",
                f"{found['macs'] / 1e6:.2f} M",
                len(found["seeds"]),
                spread(found["last_percent"]),
                spread(found["best_percent"]),
                f"{gap['mean']:+.2f}{error}" if gap else "",
                spread([seconds / 60 for seconds in found["training_seconds"]], 1),
            ]
        )
    columns = [
        *("network", "parameters in training", "at run time", "MACs", "seeds", "last epoch, %"),
        *("best epoch, %", "last epoch over baseline", "minutes of training"),
    ]
    print(markdown_table(columns, rows))
    if document["inference"]:
        print(markdown_inference(document["inference"]))
    if document["steps"]:
        print(markdown_steps(document["steps"]))


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python, ...")
    parser.add_argument("--task", default="cifar100:fine", choices=("cifar100:fine", "cifar10"))
    parser.add_argument("--runs", type=Path, default=Path("runs/expandnets"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=DEFAULT_ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kernel", type=int, default=7, choices=(3, 7))
    parser.add_argument("--rate", type=float, default=4)
    parser.add_argument("--form", default="auto", choices=("auto", "expanded", "contracted"))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--train-only", action="store_true", help="collect nothing")
    group.add_argument("--collect-only", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="measure inference and steps too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    given = vars(arguments)
    shared = ("epochs", "batch_size", "lr", "weight_decay", "precision")
    limits = ("limit_train", "limit_test")
    return Plan(
        task=arguments.task,
        data=arguments.data,
        runs=arguments.runs,
        model={name: given[name] for name in ("kernel", "rate", "form")},
        recipe={**RECIPE, **{name: given[name] for name in (*shared, *limits)}},
        seeds=tuple(arguments.seeds),
        collect_only=arguments.collect_only,
    )


def main() -> None:
    """Trains, collects, draws."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    plan, arms = plan_of(arguments), arguments.arms
    if not plan.collect_only:
        train(plan, arms)
    if arguments.train_only:
        return
    found = collect(plan, arms)
    document: dict[str, Any] = {
        "machine": machine(),
        "task": plan.task,
        "recipe": plan.recipe,
        "arms": found,
        "gaps": gaps(found),
        "contractions": contractions(plan, arms),
        "inference": [],
        "steps": [],
    }
    if arguments.time:
        folders = {arm: plan.folder(arm, plan.seeds_of(arm)[0]) for arm in arms}
        (task,) = load_config_tasks(plan.config(arms[0], plan.seeds_of(arms[0])[0]))
        document["inference"] = time_inference(folders, task, arguments.threads)
        models = {arm: found[arm]["model"] for arm in arms}
        document["steps"] = time_steps(models, task, arguments.batch_size, arguments.threads)
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{plan.name}.json", text.encode())
    draw(document, arguments.out / f"{plan.name}.png")
    print_tables(document)


if __name__ == "__main__":
    main()
