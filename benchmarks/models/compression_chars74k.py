"""Neurons that characters do not need: Dec3 on chars74k, 36 classes: docs/results/compression.md.

    python benchmarks/models/compression_chars74k.py --data data --runs runs/chars74k --seeds 0 1

Writes docs/results/compression_chars74k.*. Trains what is not trained yet (a finished run in --runs
is kept, an interrupted one goes on), with one recipe for all, and no choice of an epoch by the test
images: Dec3 as it is; with group sparsity to several shares of its parameters, to the last epoch or
to --reload-epoch, after which the smaller network is trained on; to one of the shares with the l1
term too; and to small shares (--rank-targets) with low rank in place of group sparsity or beside
it. What is asked: how many neurons go before the accuracy is below that of the network as it is.
Classes have 33 to 734 images, so that the mean over the classes is told too.

The paper's Dec3-512 takes 2.2 billion multiply-adds an image at 24 x 24 grey pixels, some ten
minutes of one core for an epoch of 7,324 images. Shortened, so that a run takes 5 to 8 minutes: the
default is --width 128, 10 epochs, bfloat16 (the paper: 45 epochs of 256,000 images). --width 512 is
the paper's, for a machine with a GPU (--device cuda). --arms trains some kinds of arms only, for
several processes; --time measures inference, for which nothing else may run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compression_arms import Arm, Plan, train
from compression_inference import FORMS, markdown_times, time_networks
from compression_tables import (
    collect,
    draw_accuracy,
    draw_layers,
    draw_times,
    neurons,
    print_arms,
)
from timing import machine

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.train import load_config_tasks
from pyeff.train.batches import normalise

NAME = "compression_chars74k"
KINDS = ("dense", "group", "reload", "sgl", "rank")
RECIPE: dict[str, Any] = {"schedule": "onecycle", "lr": 0.1, "weight_decay": 5e-4}
BATCHES = (1, 32)
RANK_KINDS = ("lowrank", "both")


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    given = vars(arguments)
    shared = ("epochs", "precision", "image_size", "limit_train", "limit_test", "device")
    arms = [Arm("dense")]
    for epoch in (None, arguments.reload_epoch):
        arms += [Arm("group", target, epoch) for target in arguments.targets]
    arms.append(Arm("sgl", arguments.targets[0]))
    for target in arguments.rank_targets:
        of_each = [Arm(kind, target, arguments.reload_epoch) for kind in ("group", *RANK_KINDS)]
        arms += [arm for arm in of_each if arm not in arms]
    return Plan(
        name=f"dec3_{arguments.width}",
        task="chars74k:grey",
        model={"family": "dec3", "width": arguments.width},
        data=arguments.data,
        runs=arguments.runs,
        recipe={**RECIPE, **{key: given[key] for key in shared}},
        penalties={},
        arms=tuple(arms),
        seeds=tuple(arguments.seeds),
        ablation_seeds=tuple(arguments.ablation_seeds),
        headline=frozenset(arm.name for arm in arms if arm.kind != "sgl"),
    )


def kind_of(arm: Arm) -> str:
    """Which of :data:`KINDS` an arm is."""
    if arm.kind in RANK_KINDS:
        return "rank"
    return arm.kind if arm.epoch is None else "reload"


def without_loss(arms: dict[str, Any], measure: str) -> dict[str, Any] | None:
    """The smallest network whose mean over its seeds is not below that of dense.

    Args:
        arms: of :func:`compression_tables.collect`.
        measure: ``"accuracy_percent"`` or ``"class_mean_percent"``.

    Returns:
        Its name, the share of neurons and parameters removed, and by how many points it is above
        dense, over the seeds that both have; ``None`` where every network is below.
    """
    dense = arms["dense"]
    best: dict[str, Any] | None = None
    for name, found in arms.items():
        count = neurons(found)
        if count is None:
            continue
        same = [seed for seed in found["seeds"] if seed in dense["seeds"]]
        gains = [
            found[measure][found["seeds"].index(seed)] - dense[measure][dense["seeds"].index(seed)]
            for seed in same
        ]
        if not gains or statistics.mean(gains) < 0:
            continue
        params = statistics.mean(found["params"])
        if best is None or params < best["params"]:
            best = {
                "network": name,
                "seeds": same,
                "params": params,
                "params_removed": 1 - params / statistics.mean(dense["params"]),
                "neurons_removed": 1 - count[1] / count[0],
                "gain_points": statistics.mean(gains),
            }
    return best


def measured(plan: Plan, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Inference of all arms' networks on test images."""
    seed = plan.seeds[0]
    arms = [arm for arm in plan.arms if seed in plan.seeds_of(arm)]
    (task,) = load_config_tasks(plan.config(arms[0], seed))
    networks = {arm.name: pyeff.load(plan.folder(arm, seed)) for arm in arms}
    images = normalise(task.test_images[: max(BATCHES)], task.mean, task.std)
    return time_networks(
        networks,
        images,
        BATCHES,
        arguments.threads,
        forms=arguments.forms,
        max_seconds=arguments.max_seconds,
    )


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    print_arms(document["arms"])
    for measure, found in document["without_loss"].items():
        if found is None:
            print(f"{measure}: every smaller network is below dense")
            continue
        print(
            f"{measure}: {found['network']} loses nothing ({found['gain_points']:+.2f} points, "
            f"{len(found['seeds'])} seed(s)) with {found['neurons_removed']:.0%} of the neurons "
            f"and {found['params_removed']:.0%} of the parameters removed"
        )
    if document["inference"]:
        print("\n" + markdown_times(document["inference"]))


def finish(plan: Plan, arguments: argparse.Namespace) -> None:
    """Collects, measures, draws and prints."""
    arms = collect(plan)
    document: dict[str, Any] = {
        "machine": machine(),
        "model": plan.model,
        "recipe": plan.recipe,
        "arms": arms,
        "without_loss": {
            measure: without_loss(arms, measure)
            for measure in ("accuracy_percent", "class_mean_percent")
        },
        "inference": measured(plan, arguments) if arguments.time else [],
    }
    stem = arguments.out / NAME
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(stem.with_suffix(".json"), text.encode())
    width, epochs = arguments.width, arguments.epochs
    title = f"Dec3-{width} on chars74k, {epochs} epochs"
    draw_accuracy(arms, stem.with_suffix(".png"), title)
    draw_times(arms, stem.with_name(f"{NAME}_times.png"), title)
    chosen = document["without_loss"]["accuracy_percent"]
    drawn = chosen["network"] if chosen else Arm("group", arguments.targets[0]).name
    draw_layers(arms, next(arm for arm in plan.arms if arm.name == drawn), stem)
    print_tables(document)


def main() -> None:
    """Trains, collects, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds chars74k")
    parser.add_argument("--runs", type=Path, default=Path("runs/chars74k"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--arms", nargs="*", choices=KINDS, help="train these only, and stop")
    parser.add_argument(
        "--targets",
        type=float,
        nargs="+",
        default=[0.6, 0.8, 0.3],
        help="shares of the parameters; sparse group lasso is run for the first",
    )
    parser.add_argument(
        "--rank-targets",
        type=float,
        nargs="*",
        default=[0.3, 0.15],
        help="shares that low rank, alone and with group sparsity, is asked for, with a reload",
    )
    parser.add_argument("--reload-epoch", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=24, help="side in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time", action="store_true", help="measure inference too")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timing, for a batch")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments)
    train(plan, [a for a in plan.arms if not arguments.arms or kind_of(a) in arguments.arms])
    if not arguments.arms:
        finish(plan, arguments)


if __name__ == "__main__":
    main()
