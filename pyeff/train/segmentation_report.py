"""What a run for segmentation leaves behind, and the table of a checkpoint."""

import contextlib
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from pyeff.checkpoint import (
    MODEL_FILE_NAME,
    read_archive,
    rebuild,
    save,
    write_bytes_atomically,
)
from pyeff.measure import LevelCost, measure_cost, measure_latency
from pyeff.ops import backend as forced_backend
from pyeff.train.evaluate import evaluating
from pyeff.train.network import lay_out
from pyeff.train.processes import choose_device
from pyeff.train.segmentation_augment import to_input
from pyeff.train.segmentation_config import (
    SegmentationConfig,
    load_segmentation,
    segmentation_config_from_json,
)
from pyeff.train.segmentation_data import SegmentationData
from pyeff.train.segmentation_metrics import SegmentationScore, evaluate_segmentation
from pyeff.train.segmentation_plots import plot_course, plot_frames
from pyeff.train.segmentation_state import COURSE_FILE_NAME, FRAMES_FILE_NAME, RESULTS_FILE_NAME
from pyeff.train.segmentation_trainer import SegmentationResult, SegmentationTrainer

_FRAMES = 6


@dataclass(frozen=True)
class SegmentationReport:
    """What a network gives and costs.

    Attributes:
        scores: one for each size that was evaluated; empty without data.
        cost: of one picture at ``size``, with ``latency_s`` where it was measured.
        size: ``(H, W)`` that the network sees.
    """

    scores: Sequence[SegmentationScore]
    cost: LevelCost
    size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "results": [score.to_json() for score in self.scores],
            "cost": asdict(self.cost),
            "size": list(self.size),
        }


def is_segmentation_run(checkpoint: str) -> bool:
    """Whether a checkpoint is of ``pyeff train erfnet``.

    Raises:
        FileNotFoundError, ValueError: see :func:`pyeff.checkpoint.read_archive`.
    """
    return "segmentation" in read_archive(checkpoint)[1]


def cost_of(model: nn.Module, size: tuple[int, int], *, latency: bool = False) -> LevelCost:
    """What a network for segmentation costs.

    Args:
        model: in eval mode.
        size: ``(H, W)`` of the picture.
        latency: also run it on one picture, on its device.
    """
    cost = measure_cost(copy.deepcopy(model).to("meta"), (3, *size), 1)
    if not latency:
        return cost
    like = next(model.parameters())
    x = torch.rand(1, 3, *size, device=like.device, dtype=like.dtype)
    lay_out(model, torch.channels_last)
    (seconds,) = measure_latency([model], x.to(memory_format=torch.channels_last))
    return replace(cost, latency_s=seconds)


def evaluate_segmentation_checkpoint(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str | None = None,
    official: bool = False,
    limit_test: int | None = None,
    accuracy: bool = True,
    latency: bool = True,
    device: str = "auto",
    backend: str | None = None,
) -> SegmentationReport:
    """Evaluates a run's network.

    Args:
        checkpoint: its folder, or a file of it.
        data: folder of the data set; by default the run's own.
        split: by default ``test``, or ``val`` where there is none.
        official: also at the labels' own size.
        limit_test: at most so many pictures; by default as many as the run's own evaluation.
        accuracy: run the pictures; else only the cost is given.
        latency: measure the time of one picture.
        device: ``cpu``, ``cuda`` or ``auto``.
        backend: force one backend of the operators, see :func:`pyeff.backend`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not of such a run, or of other classes than the data.
        ImportError: a package is missing; names it.
    """
    tensors, meta = read_archive(checkpoint)
    if "segmentation" not in meta:
        raise ValueError(
            f"eval: {checkpoint} must be of a run of pyeff train erfnet, got another one"
        )
    config = segmentation_config_from_json(meta["config"])
    settings: dict[str, Any] = {"data": data if data is not None else config.data}
    if limit_test is not None:
        settings["limit_test"] = limit_test
    config = replace(config, **settings)
    model = rebuild(tensors, meta, checkpoint).to(choose_device(device))
    lay_out(model, torch.channels_last)
    scores: list[SegmentationScore] = []
    with forced_backend(backend) if backend else contextlib.nullcontext():
        if accuracy:
            found = load_segmentation(config, ("val", "test") if split is None else (split,))
            _check_classes(checkpoint, meta["segmentation"]["class_names"], found)
            scores = evaluate_segmentation(
                model,
                found,
                split or found.held_out,
                official=official,
                batch_size=config.batch_size,
            )
        size = (config.size[0], config.size[1])
        return SegmentationReport(scores, cost_of(model, size, latency=latency), size)


def _check_classes(checkpoint: str, trained: Sequence[str], data: SegmentationData) -> None:
    if list(trained) != list(data.class_names):
        raise ValueError(
            f"eval: data must have the classes of {checkpoint} {list(trained)}, got "
            f"{list(data.class_names)}"
        )


def train_and_report_segmentation(
    config: SegmentationConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    backend: str | None = None,
    console: Console | None = None,
) -> SegmentationResult:
    """Trains, and writes ``model.safetensors``, ``results.json`` and pictures beside the metrics.

    Args:
        config: the run.
        resume: go on from the checkpoint in ``config.out``.
        overwrite: start anew although there is a checkpoint.
        backend: force one backend of the operators, see :func:`pyeff.backend`.
        console: where the table is printed.

    Returns:
        The network and its scores.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, TrainingInterrupted: see
            :meth:`pyeff.train.segmentation_trainer.SegmentationTrainer.fit`.
    """
    trainer = SegmentationTrainer(config)
    with forced_backend(backend) if backend else contextlib.nullcontext():
        result = trainer.fit(resume=resume, overwrite=overwrite)
        if not trainer.first:
            return result
        size = (config.size[0], config.size[1])
        report = SegmentationReport(result.scores, cost_of(result.model, size), size)
        write_segmentation_report(trainer, result, report)
    print_segmentation_report(report, console)
    return result


def write_segmentation_report(
    trainer: SegmentationTrainer, result: SegmentationResult, report: SegmentationReport
) -> None:
    """Writes the final model, the scores as JSON and the pictures."""
    out, data = trainer.out, trainer.data
    save(
        result.model,
        out / MODEL_FILE_NAME,
        extra={**trainer.describe(), "epoch": result.epoch},
    )
    document = {
        "config": trainer.config.to_json(),
        "seconds": result.seconds,
        "seconds_an_epoch": seconds_an_epoch(result.records),
        "epoch": result.epoch,
        "left_fresh": result.left_fresh,
        **report.to_json(),
    }
    text = json.dumps(document, indent=2) + "\n"
    write_bytes_atomically(out / RESULTS_FILE_NAME, text.encode())
    plot_course(result.records, out / COURSE_FILE_NAME)
    frames = predicted_frames(result.model, data, data.held_out, _FRAMES)
    plot_frames(frames, data.class_names, data.palette, out / FRAMES_FILE_NAME)


def seconds_an_epoch(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of an epoch's training steps, by stage (JSON's keys are strings)."""
    spent: dict[str, list[float]] = {}
    before = 0.0
    for record in records:
        spent.setdefault(str(record["stage"]), []).append(record["seconds"] - before)
        before = record["seconds"]
    return {stage: sum(times) / len(times) for stage, times in spent.items()}


def predicted_frames(
    model: nn.Module, data: SegmentationData, split: str, count: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Picture, prediction and label of some frames, evenly spread over a split.

    Args:
        model: labels the pixels.
        data: the data set.
        split: one of its splits.
        count: at most so many.

    Returns:
        uint8 ``[H, W, 3]``, ``[H, W]`` and ``[H, W]`` of each.
    """
    chosen, like = data.split(split), next(model.parameters())
    count = min(count, len(chosen))
    frames = []
    with evaluating(model):
        for index in (i * len(chosen) // count for i in range(count)):
            image: Tensor = chosen.images[index : index + 1]
            logits = model(to_input(image).to(like.device, like.dtype))
            size = (image.shape[1], image.shape[2])
            if logits.shape[2:] != size:
                logits = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
            predicted = logits.argmax(1)[0].to(torch.uint8).cpu().numpy()
            frames.append((image[0].numpy(), predicted, chosen.labels[index].numpy()))
    return frames


def print_segmentation_report(report: SegmentationReport, console: Console | None = None) -> None:
    """Prints the scores with their sizes, every class, and the cost."""
    console = console or Console()
    if report.scores:
        table = Table(box=SIMPLE)
        table.add_column("IoU %")
        for score in report.scores:
            size = "own sizes" if score.size is None else f"{score.size[0]}x{score.size[1]}"
            table.add_column(f"{score.split}, {score.eval_size} size ({size})", justify="right")
        for name in report.scores[0].class_iou:
            table.add_row(name, *(_percent(score.class_iou[name]) for score in report.scores))
        table.add_section()
        table.add_row("mean", *(_percent(score.miou) for score in report.scores), style="bold")
        table.add_row(
            "pixel accuracy", *(_percent(score.pixel_accuracy) for score in report.scores)
        )
        console.print(table)
    cost = report.cost
    words = f"{cost.params:,} parameters, {cost.macs / 1e9:.2f} GMAC at " + "x".join(
        map(str, report.size)
    )
    if cost.latency_s is not None:
        words += f", {1e3 * cost.latency_s:.1f} ms a picture"
    console.print(words, highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
