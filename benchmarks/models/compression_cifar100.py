"""Compression while training beside what it is compared with, on CIFAR-100.

    python benchmarks/models/compression_cifar100.py --data data --runs runs/compression --seeds 0 1

Writes docs/results/compression_<network>.*. Trains what is not trained yet (a finished run in
--runs is kept, an interrupted one goes on), with one recipe for all, and no choice of an epoch by
the test images. The arms are those of compression_arms.py. The networks:

- dec8: eight pairs of 3 x 1 and 1 x 3 convolutions (see decomposeme_cifar100.py), twice as wide as
  there, since the papers start from networks that are too large;
- resnet: ResNet-20 of plain convolutions, norms after them.

Shortened, so that a run takes 5 to 8 minutes of one core: 8 epochs of the first 20,000 training
images (the papers: 55 epochs of 1.2 million), bfloat16. --arms trains some kinds of arms only, for
several processes; --time measures inference and a training step, for which nothing else may run.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compression_arms import KINDS, Arm, Plan, arms_of, train
from compression_inference import FORMS, markdown_times, time_networks, time_steps
from compression_tables import collect, draw_accuracy, draw_layers, draw_times, print_arms
from timing import machine, markdown_table

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.compress import LowRank
from pyeff.train import load_config_tasks
from pyeff.train.batches import normalise
from pyeff.train.compress_options import parse_compress

TASK = "cifar100:fine"
NETWORKS: dict[str, dict[str, Any]] = {
    "dec8": {
        "family": "decomposeme",
        "width": [32, 64, 128, 128, 256, 256, 256, 256],
        "pools": [1, 2, 4],
        "norm": "both",
    },
    "resnet": {
        "family": "backbone",
        "backbone": "resnet20",
        "widths": [16, 32, 64],
        # Norms after convolutions can be folded into them.
        "preactivation": False,
    },
}
RECIPE: dict[str, Any] = {"schedule": "onecycle", "lr": 0.1, "weight_decay": 5e-4}
# Sparse group lasso is compared on the characters: compression_chars74k.py.
ARMS = tuple(kind for kind in KINDS if kind != "sgl")
# The comparison that the page is about.
HEADLINE = ("dense", "group", "lowrank", "both", "posthoc", "small")
TIMED = ("dense", "group", "lowrank", "both")
BATCHES = (1, 32)
# Shares of the sum of a layer's singular values; 1 is the numerical rank.
ENERGIES = (0.8, 0.9, 1.0)


def plans_of(arguments: argparse.Namespace) -> list[Plan]:
    """The plan of every network that the command line asks for."""
    given = vars(arguments)
    shared = ("epochs", "precision", "limit_train", "limit_test", "device")
    arms = arms_of(ARMS, arguments.targets, arguments.reload)
    plans = []
    for name in arguments.networks:
        model = dict(NETWORKS[name])
        key = "width" if name == "dec8" else "widths"
        model[key] = given[f"{name}_widths"] or model[key]
        plans.append(
            Plan(
                name=name,
                task=TASK,
                model=model,
                data=arguments.data,
                runs=arguments.runs,
                recipe={**RECIPE, **{key: given[key] for key in shared}},
                penalties=_penalties(arguments.penalties),
                arms=arms,
                seeds=tuple(arguments.seeds),
                ablation_seeds=tuple(arguments.ablation_seeds),
                headline=frozenset(
                    arm.name
                    for arm in arms
                    if arm.kind in HEADLINE and arm.target in (None, arguments.targets[0])
                ),
            )
        )
    return plans


def _penalties(words: str) -> dict[str, Any]:
    """Options for all arms with penalties; which penalty there is, the arm decides."""
    if not words:
        return {}
    options = parse_compress(f"group=auto,{words}")
    del options["group"]
    return options


def measured(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Inference of the headline's networks, and a training step of those of reloading."""
    seed = plan.seeds[0]
    arms = [arm for arm in plan.arms if seed in plan.seeds_of(arm)]
    (task,) = load_config_tasks(plan.config(arms[0], seed))
    loaded = {arm.name: pyeff.load(plan.folder(arm, seed)) for arm in arms}
    # Small has the layers of both; posthoc and the others are of the same size.
    networks = {
        arm.name: loaded[arm.name]
        for arm in arms
        if arm.kind in TIMED and arm.name in plan.headline
    }
    size = plan.config(arms[0], seed).batch_size
    images = normalise(task.train_images[:size], task.mean, task.std)
    rows = time_networks(
        networks,
        images,
        BATCHES,
        arguments.threads,
        forms=arguments.forms,
        max_seconds=arguments.max_seconds,
    )
    reloaded = {a.name: copy.deepcopy(loaded[a.name]) for a in arms if a.kind == "reload"}
    steps = time_steps(
        {"dense": copy.deepcopy(loaded["dense"]), **reloaded},
        images,
        task.train_labels[:size],
        precision=plan.recipe["precision"],
    )
    return {"inference": rows, "step_seconds": steps}


def reload_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What reloading saves by measured steps: the penalties' own time is not in it."""
    epochs, steps = document["recipe"]["epochs"], document["step_seconds"]
    rows = []
    for name, found in document["arms"].items():
        if found["kind"] == "reload" and name in steps:
            share = steps[name] / steps["dense"]
            rows.append(
                {
                    "network": name,
                    "epoch": found["epoch"],
                    "step_share": share,
                    "saved": (1 - found["epoch"] / epochs) * (1 - share),
                    "accuracy_percent": statistics.mean(found["accuracy_percent"]),
                    "wall_share": statistics.mean(found["seconds"])
                    / statistics.mean(document["arms"]["dense"]["seconds"]),
                }
            )
    return rows


def rank_rows(plan: Plan, arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Ranks summed over the layers: of dense by shares of the singular values, and of lowrank.

    Of lowrank the singular values that the last application left: all that there are.
    """
    seed = plan.seeds[0]
    dense = LowRank(pyeff.load(plan.folder(Arm("dense"), seed)), strength=0.0)
    names = dense.layers
    rows = [
        {"network": "dense", "energy": energy, "rank": sum(dense.ranks(energy).values())}
        for energy in ENERGIES
    ]
    for name, found in arms.items():
        if found["kind"] == "lowrank":
            epochs = found["compression"][0]["ranks"]
            ranks = epochs[max(epochs, key=int)]
            rank = sum(ranks[layer] for layer in names)
            rows.append({"network": name, "energy": 1.0, "rank": rank})
    return rows


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    print(f"## {document['network']}\n")
    print_arms(document["arms"])
    for row in document["ranks"]:
        print(f"{row['network']}: ranks of {row['rank']} at {row['energy']:g} of their sum")
    print()
    if document["inference"]:
        print(markdown_times(document["inference"]))
    if document["reload"]:
        rows = [
            [
                row["network"],
                row["epoch"],
                f"{row['step_share']:.0%}",
                f"{row['saved']:.0%}",
                f"{1 - row['wall_share']:.0%}",
                f"{row['accuracy_percent']:.2f}",
            ]
            for row in document["reload"]
        ]
        columns = ["network", "after epoch", "a step, of dense", "saved by steps"]
        print(markdown_table([*columns, "saved by wall time", "accuracy, %"], rows))


def finish(plan: Plan, arguments: argparse.Namespace) -> None:
    """Collects, measures, draws and prints one network's runs."""
    document: dict[str, Any] = {
        "machine": machine(),
        "network": plan.name,
        "model": plan.model,
        "recipe": plan.recipe,
        "penalties": plan.penalties,
        "arms": collect(plan),
        "ranks": [],
        "inference": [],
        "step_seconds": {},
    }
    if arguments.time:
        document |= measured(plan, arguments)
    document["ranks"] = rank_rows(plan, document["arms"])
    document["reload"] = reload_rows(document)
    stem = arguments.out / f"compression_{plan.name}"
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(stem.with_suffix(".json"), text.encode())
    epochs = plan.recipe["epochs"]
    title = f"{plan.name} on CIFAR-100, {epochs} short epochs"
    draw_accuracy(document["arms"], stem.with_suffix(".png"), title)
    draw_times(document["arms"], stem.with_name(f"{stem.name}_times.png"), title)
    for arm in plan.arms:
        if arm.kind == "both" and arm.name in plan.headline:
            draw_layers(document["arms"], arm, stem)
    print_tables(document)


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="train these only, and stop")
    parser.add_argument(
        "--targets",
        type=float,
        nargs="+",
        default=[0.4],
        help="shares of the parameters; the first is the headline's",
    )
    parser.add_argument("--reload", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--penalties", default="", help="further options, as of --compress")
    parser.add_argument("--dec8-widths", type=int, nargs=8)
    parser.add_argument("--resnet-widths", type=int, nargs=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--limit-train", type=int, default=20_000)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time", action="store_true", help="measure inference and a step too")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timing, for a batch")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Trains, collects, draws."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    for plan in plans_of(arguments):
        train(plan, [a for a in plan.arms if not arguments.arms or a.kind in arguments.arms])
        if not arguments.arms:
            finish(plan, arguments)


if __name__ == "__main__":
    main()
