"""What a run leaves behind: the final model, the table, the plots, and words for the terminal."""

import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pyeff.checkpoint import save, write_bytes_atomically
from pyeff.measure import LevelCost, measure_cost, measure_latency
from pyeff.models.nested_resnet import NestedResNet
from pyeff.ops import backend as forced_backend
from pyeff.train.config import TrainConfig
from pyeff.train.evaluate import LevelResult
from pyeff.train.plots import plot_levels
from pyeff.train.tasks import TaskData
from pyeff.train.trainer import Trainer, TrainResult

MODEL_FILE = "model.safetensors"


def level_results(
    model: nn.Module,
    image_shapes: Mapping[str, Sequence[int]],
    accuracy: Mapping[tuple[str, int], float] | None = None,
    *,
    measure_latency: bool = False,
) -> list[LevelResult]:
    """Costs and accuracy of every (task, level).

    Args:
        model: nested, or a plain backbone.
        image_shapes: task name to ``(C, H, W)``.
        accuracy: what :func:`pyeff.train.evaluate` gave.
        measure_latency: run each level and take its time.

    Returns:
        One entry a task and level, in the order of the tasks.
    """
    results = []
    for task, shape in image_shapes.items():
        for cost in _costs(model, task, shape, measure_latency):
            results.append(
                LevelResult(
                    task=task,
                    level=cost.level,
                    accuracy=None if accuracy is None else accuracy[task, cost.level],
                    params=cost.params,
                    macs=cost.macs,
                    weight_bytes=cost.weight_bytes,
                    peak_bytes=cost.peak_bytes,
                    latency_s=cost.latency_s,
                )
            )
    return results


def _costs(
    model: nn.Module, task: str, shape: Sequence[int], latency: bool
) -> list[LevelCost]:
    if isinstance(model, NestedResNet):
        return model.costs(task, input_size=(shape[1], shape[2]), latency=latency)
    plain = model.eval()
    counted = copy.deepcopy(plain).to("meta")
    cost = measure_cost(counted, (shape[0], shape[1], shape[2]), 1)
    if not latency:
        return [cost]
    like = next(plain.parameters())
    x = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    plain = plain.to(memory_format=torch.channels_last)
    seconds = measure_latency([plain], x.to(memory_format=torch.channels_last))
    return [replace(cost, latency_s=seconds[0])]


def print_results(results: Sequence[LevelResult], console: Console | None = None) -> None:
    """Prints the table, with the columns that are known."""
    table = Table()
    table.add_column("task")
    for name in ("level", "accuracy", "parameters", "MACs", "weights", "peak", "latency"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.task,
            str(result.level),
            "-" if result.accuracy is None else f"{result.accuracy:.2%}",
            f"{result.params:,}",
            f"{result.macs / 1e6:,.2f} M",
            f"{result.weight_bytes / 1024:,.1f} KiB",
            f"{result.peak_bytes / 1024:,.1f} KiB",
            "-" if result.latency_s is None else f"{result.latency_s * 1e3:.3f} ms",
        )
    (console or Console()).print(table)


def train_and_report(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    backend: str | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains, and writes ``model.safetensors``, ``results.json`` and the plots beside the metrics.

    Args:
        config: the run.
        resume: go on from the checkpoint in ``config.out``.
        overwrite: start anew although there is a checkpoint.
        backend: force one backend of the operators, see :func:`pyeff.backend`.
        console: where the table is printed.

    Returns:
        The network and its metrics.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, TrainingInterrupted: see
            :meth:`pyeff.train.Trainer.fit`.
    """
    trainer = Trainer(config)
    with forced_backend(backend) if backend else contextlib.nullcontext():
        result = trainer.fit(resume=resume, overwrite=overwrite)
        if not trainer.first:
            return result
        shapes = {task.name: task.image_shape for task in trainer.tasks}
        results = level_results(result.model, shapes, result.accuracy)
    write_report(trainer.out, config, trainer.tasks, result, results)
    print_results(results, console)
    return result


def write_report(
    out: Path,
    config: TrainConfig,
    tasks: Sequence[TaskData],
    result: TrainResult,
    results: Sequence[LevelResult],
) -> None:
    """Writes the final model, the table as JSON and the plots.

    Args:
        out: the run's folder.
        config: the run.
        tasks: its data.
        result: what training returned.
        results: the table.
    """
    described = {task.name: task.describe() for task in tasks}
    save(result.model, out / MODEL_FILE, extra={"tasks": described, "config": config.to_json()})
    document: dict[str, Any] = {
        "config": config.to_json(),
        "seconds": result.seconds,
        "results": [line.to_json() for line in results],
    }
    write_bytes_atomically(out / "results.json", (json.dumps(document, indent=2) + "\n").encode())
    plot_levels(results, out / "levels.png")
