"""ResNet-50* that learns its size while it trains, on CIFAR-100: docs/results/compression.md.

    python benchmarks/models/compress_resnet50_training.py --data data --runs runs/resnet50

Writes docs/results/compress_resnet50_training.json. The paper's network at its full widths, with
100 classes, on images of 32 x 32 in place of ImageNet's 224 x 224, of which it makes a map of one
pixel: a trial of the mechanism on a large network, in a few short epochs, and no claim about the
accuracy that it can reach. One recipe for all; the arms are those of compression_arms.py. A
finished run in --runs is kept, an interrupted one goes on; --arms trains some kinds only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compression_arms import Plan, arms_of, train
from compression_tables import collect, print_arms
from timing import machine

from pyeff.checkpoint import write_bytes_atomically

NAME = "compress_resnet50_training"
KINDS = ("dense", "group", "both", "reload")
RECIPE: dict[str, Any] = {"schedule": "onecycle", "lr": 0.02, "weight_decay": 5e-4}


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    given = vars(arguments)
    shared = ("epochs", "precision", "limit_train", "limit_test", "device")
    arms = arms_of(KINDS, [arguments.share], [arguments.reload_epoch])
    return Plan(
        name="resnet50",
        task="cifar100:fine",
        model={"family": "resnet50_decomposed"},
        data=arguments.data,
        runs=arguments.runs,
        recipe={**RECIPE, **{key: given[key] for key in shared}},
        penalties={},
        arms=arms,
        seeds=tuple(arguments.seeds),
        ablation_seeds=(),
        headline=frozenset(arm.name for arm in arms),
    )


def main() -> None:
    """Trains, collects, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/resnet50"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--arms", nargs="*", choices=KINDS, help="train these only, and stop")
    parser.add_argument("--share", type=float, default=0.7, help="of the parameters to be left")
    parser.add_argument("--reload-epoch", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--limit-train", type=int, default=10_000)
    parser.add_argument("--limit-test", type=int, default=5_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments)
    train(plan, [arm for arm in plan.arms if not arguments.arms or arm.kind in arguments.arms])
    if arguments.arms:
        return
    document = {
        "machine": machine(),
        "model": plan.model,
        "recipe": plan.recipe,
        "arms": collect(plan),
    }
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{NAME}.json", text.encode())
    print_arms(document["arms"])


if __name__ == "__main__":
    main()
