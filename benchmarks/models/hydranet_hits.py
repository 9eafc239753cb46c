"""How many images a HydraNet gets right whose own branch runs for them, and how many of the others.

    python benchmarks/models/hydranet_hits.py --data data --runs runs/hydranet --seeds 0 1 2

Reads the finished runs of hydranet_cifar100.py and prints a line for each.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timing import markdown_table

import pyeff
from pyeff.train import load_tasks
from pyeff.train.batches import normalise

ARMS, BATCH = ("clustered", "random"), 500


@torch.no_grad()
def outcomes(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every image: whether its class's branch ran, and whether the answer is right. bool [N]."""
    ran, right = [], []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        out = model.forward_with_gate(x, None)
        ran.append((out.routes.index == model.class_group[y][:, None]).any(1))
        right.append(out.logits.argmax(1) == y)
    return torch.cat(ran), torch.cat(right)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds cifar-100-python")
    parser.add_argument("--runs", type=Path, default=Path("runs/hydranet"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    (task,) = load_tasks(("cifar100:fine",), arguments.data)
    images = normalise(task.test_images, task.mean, task.std)
    rows = []
    for arm in ARMS:
        for seed in arguments.seeds:
            model = pyeff.load(arguments.runs / f"{arm}_s{seed}")
            ran, right = outcomes(model, images, task.test_labels)
            shares = [part.double().mean() for part in (ran, right[ran], right[~ran])]
            rows.append([arm, seed, *(f"{100 * float(share):.1f}" for share in shares)])
    columns = ["partition", "seed", "own branch ran, %", "right of those, %", "right of others, %"]
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
