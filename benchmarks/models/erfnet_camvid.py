"""ERFNet on CamVid, beside its dense form and after drawn streets: docs/results/erfnet_camvid.*.

    python benchmarks/models/erfnet_camvid.py --data data --runs runs/erfnet --size 180x240 \
        --stage1-epochs 30 --epochs 60 --seeds 0 1

Trains what is not trained yet (a finished run in --runs is kept, an interrupted one goes on), with
one recipe for all: the network of pairs and the same network with 3 x 3 convolutions, each from
scratch and from weights that drawn streets gave. Then writes the numbers and a picture with six
test frames, and prints the tables. --arms trains a part of the runs only, for several processes;
--with-arms says which there are; --time measures inference as well.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished_runs import check_recipe, results_of
from timing import compare, machine, markdown_table, prefer_this_process

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.train.network import lay_out
from pyeff.train.segmentation_config import (
    SegmentationConfig,
    load_segmentation,
    segmentation_config_from_json,
)
from pyeff.train.segmentation_plots import plot_frames
from pyeff.train.segmentation_report import predicted_frames, train_and_report_segmentation

FORMS = {"pairs": {}, "dense": {"dense": True}}
# An arm is a form, from scratch or after streets; streets are trained first.
ARMS = tuple(f"{form}{start}" for form in FORMS for start in ("", "_after_streets"))
STREETS = "streets"
FRAMES = 6
BATCHES = (1, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAME = "erfnet_camvid"


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        data: folder that holds CamVid.
        runs: folder of the runs.
        seeds: of every arm.
        recipe: settings of all runs.
        camvid: epochs of both stages on CamVid.
        streets: the same on drawn streets, and their number.
    """

    data: Path
    runs: Path
    seeds: tuple[int, ...]
    recipe: dict[str, Any]
    camvid: dict[str, Any]
    streets: dict[str, Any]

    def folder(self, arm: str, seed: int) -> Path:
        """Where a run is."""
        return self.runs / f"{arm}_s{seed}"

    def config(self, arm: str, seed: int) -> SegmentationConfig:
        """One run on CamVid."""
        form = arm.removesuffix("_after_streets")
        first = self.folder(f"{STREETS}_{form}", seed) if form != arm else None
        return SegmentationConfig(
            dataset="camvid",
            data=str(self.data),
            out=str(self.folder(arm, seed)),
            model={"family": "erfnet", **FORMS[form]},
            init_from=None if first is None else str(first),
            seed=seed,
            eval_size="official",
            **self.recipe,
            **self.camvid,
        )

    def streets_config(self, form: str, seed: int) -> SegmentationConfig:
        """The run on drawn streets that an arm starts from."""
        return SegmentationConfig(
            dataset="streets",
            out=str(self.folder(f"{STREETS}_{form}", seed)),
            model={"family": "erfnet", **FORMS[form]},
            seed=seed,
            **self.recipe,
            **self.streets,
        )


def finish(config: SegmentationConfig) -> None:
    """Trains a run to its end, if it is not there."""
    folder = Path(config.out)
    if results_of(folder) is None:
        begun = (folder / "checkpoint.safetensors").exists()
        train_and_report_segmentation(config, resume=begun)
    else:
        finished(config)


def finished(config: SegmentationConfig) -> dict[str, Any]:
    """What a finished run left.

    Raises:
        SystemExit: there is none, or it is of another recipe.
    """
    folder = Path(config.out)
    found = results_of(folder)
    if found is None:
        raise SystemExit(f"{NAME}: {folder} must hold a finished run, got none")
    check_recipe(folder, _recipe(segmentation_config_from_json(found["config"])), _recipe(config))
    return found


def _recipe(config: SegmentationConfig) -> dict[str, Any]:
    """What decides a run's result, wherever its folders are."""
    deciding = config.deciding()
    start = deciding["init_from"]
    return {**deciding, "init_from": None if start is None else Path(start).name}


def train(plan: Plan, arms: list[str]) -> None:
    """Trains the runs of some arms that are not finished."""
    for seed in plan.seeds:
        for arm in arms:
            form = arm.removesuffix("_after_streets")
            if form != arm:
                finish(plan.streets_config(form, seed))
            finish(plan.config(arm, seed))


def collect(plan: Plan, arms: list[str]) -> dict[str, Any]:
    """Scores, costs and times of every arm over its seeds."""
    found: dict[str, Any] = {}
    for arm in arms:
        runs = [finished(plan.config(arm, seed)) for seed in plan.seeds]
        scores = {
            size: [run["results"][index] for run in runs]
            for index, size in enumerate(("training", "official"))
        }
        found[arm] = {
            "seeds": list(plan.seeds),
            "params": runs[0]["cost"]["params"],
            "macs": runs[0]["cost"]["macs"],
            "kept_epoch": [run["epoch"] for run in runs],
            "training_seconds": [run["seconds"] for run in runs],
            "seconds_an_epoch": [run["seconds_an_epoch"] for run in runs],
            "scores": {
                size: {
                    "size": lines[0]["size"],
                    "images": lines[0]["images"],
                    "miou_percent": [100 * line["miou"] for line in lines],
                    "pixel_accuracy_percent": [100 * line["pixel_accuracy"] for line in lines],
                    "class_iou": [line["class_iou"] for line in lines],
                }
                for size, lines in scores.items()
            },
        }
    return found


def time_inference(plan: Plan, arms: list[str], threads: int) -> list[dict[str, Any]]:
    """Milliseconds a picture of both forms, timed in turn, at the training size."""
    prefer_this_process()
    forms = [arm for arm in arms if arm in FORMS]
    dense = "dense" if "dense" in forms else None
    height, width = plan.recipe["size"]
    rows: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        models = {f: pyeff.load(plan.folder(f, plan.seeds[0])).to(dtype) for f in forms}
        for model in models.values():
            # Not in inference mode: weights made there are never packed ahead.
            lay_out(model, torch.channels_last)
        for batch in BATCHES:
            x = torch.rand(batch, 3, height, width).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                timed = compare({form: partial(model, x) for form, model in models.items()})
            rows += [
                {
                    "precision": name,
                    "batch": batch,
                    "threads": threads,
                    "form": form,
                    "ms_a_picture": 1e3 * timed.time(form).median / batch,
                    "dense_over_it": (
                        vars(timed.speedup(form, dense)) if dense and form != dense else None
                    ),
                    "clean": timed.clean,
                }
                for form in forms
            ]
    return rows


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds; "-" where there is no value."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean = f"{statistics.mean(found):.1f}"
    return mean if len(found) < 2 else f"{mean} +- {statistics.stdev(found):.1f}"


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    arms = document["arms"]
    first = next(iter(arms.values()))["scores"]
    sizes = {name: "x".join(map(str, score["size"])) for name, score in first.items()}
    columns = ["network", "parameters", "MACs", "seeds"]
    columns += [f"{what} at {size}, %" for size in sizes.values() for what in ("mIoU", "pixels")]
    print(
        markdown_table(
            [*columns, "s an epoch, encoder", "whole"],
            [_row_of(arm, found) for arm, found in arms.items()],
        )
    )
    rows = []
    for name in first["official"]["class_iou"][0]:
        cells = []
        for found in arms.values():
            values = [iou[name] for iou in found["scores"]["official"]["class_iou"]]
            cells.append(spread([None if value is None else 100 * value for value in values]))
        rows.append([name, *cells])
    print(markdown_table([f"IoU at {sizes['official']}, %", *arms], rows))
    if document["inference"]:
        print(_times(document["inference"]))


def _row_of(arm: str, found: dict[str, Any]) -> list[Any]:
    scores, seconds = found["scores"], found["seconds_an_epoch"]
    return [
        arm.replace("_", " "),
        f"{found['params']:,}",
        f"{found['macs'] / 1e9:.2f} G",
        len(found["seeds"]),
        *(
            spread(score[f"{what}_percent"])
            for score in scores.values()
            for what in ("miou", "pixel_accuracy")
        ),
        *(spread([epochs.get(stage) for epochs in seconds]) for stage in ("1", "2")),
    ]


def _times(rows: list[dict[str, Any]]) -> str:
    keys = ("precision", "batch", "threads", "form")
    lines = []
    for row in rows:
        over = row["dense_over_it"]
        ratio = f"{over['median']:.2f} [{over['p10']:.2f}..{over['p90']:.2f}]" if over else "-"
        cells = [f"{row['ms_a_picture']:.1f}", ratio, "" if row["clean"] else "yes"]
        lines.append([*(row[key] for key in keys), *cells])
    return markdown_table([*keys, "ms a picture", "dense over it", "disturbed"], lines)


def draw(plan: Plan, arms: list[str], document: dict[str, Any], out: Path) -> None:
    """Six test frames, labelled by the best network of pairs, or by the best where there is none.

    A JPEG: photographs as PNG would be three times as large.
    """

    def score(arm: str) -> float:
        return statistics.mean(document["arms"][arm]["scores"]["training"]["miou_percent"])

    arm = max((a for a in arms if a.startswith("pairs")), key=score, default=max(arms, key=score))
    data = load_segmentation(plan.config(arm, plan.seeds[0]), ("test",))
    model = pyeff.load(plan.folder(arm, plan.seeds[0]))
    frames = predicted_frames(model, data, "test", FRAMES)
    height, width = plan.recipe["size"]
    words = f"ERFNet on CamVid's test frames, {height} x {width} ({arm.replace('_', ' ')})"
    plot_frames(frames, data.class_names, data.palette, out / f"{NAME}.jpg", title=words)


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs/erfnet_camvid"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="train these only, collect nothing")
    parser.add_argument("--with-arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--size", default="180x240", help="HEIGHTxWIDTH")
    parser.add_argument("--stage1-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--streets-stage1-epochs", type=int, default=10)
    parser.add_argument("--streets-epochs", type=int, default=20)
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--time", action="store_true", help="measure inference too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    height, _, width = arguments.size.partition("x")
    shared = ("batch_size", "lr", "precision", "eval_every", "limit_train", "limit_test")
    return Plan(
        data=arguments.data,
        runs=arguments.runs,
        seeds=tuple(arguments.seeds),
        recipe={"size": (int(height), int(width)), **{k: vars(arguments)[k] for k in shared}},
        camvid={"stage1_epochs": arguments.stage1_epochs, "epochs": arguments.epochs},
        streets={
            "stage1_epochs": arguments.streets_stage1_epochs,
            "epochs": arguments.streets_epochs,
            "scenes": arguments.scenes,
        },
    )


def main() -> None:
    """Trains, collects, draws."""
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments)
    train(plan, arguments.arms or arguments.with_arms)
    if arguments.arms:
        return
    arms = list(arguments.with_arms)
    document: dict[str, Any] = {
        "machine": machine(),
        "recipe": {**plan.recipe, **plan.camvid},
        "streets": plan.streets,
        "arms": collect(plan, arms),
        "inference": time_inference(plan, arms, arguments.threads) if arguments.time else [],
    }
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{NAME}.json", text.encode())
    draw(plan, arms, document, arguments.out)
    print_tables(document)


if __name__ == "__main__":
    main()
