"""What a run leaves behind: the final model, the table, the plots, and words for the terminal."""

import contextlib
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from pyeff.checkpoint import (
    MODEL_FILE_NAME,
    read_archive,
    rebuild,
    save,
    write_bytes_atomically,
)
from pyeff.measure import LevelCost, measure_cost, measure_latency
from pyeff.models.nested_resnet import NestedResNet
from pyeff.ops import backend as forced_backend
from pyeff.train.config import TrainConfig, config_from_json
from pyeff.train.evaluate import LevelResult, evaluate
from pyeff.train.plots import plot_levels
from pyeff.train.processes import choose_device
from pyeff.train.session import TrainResult
from pyeff.train.tasks import TaskData
from pyeff.train.trainer import Trainer, load_config_tasks


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


def _costs(model: nn.Module, task: str, shape: Sequence[int], latency: bool) -> list[LevelCost]:
    if isinstance(model, NestedResNet):
        return model.costs(task, input_size=(shape[1], shape[2]), latency=latency)
    plain = model.eval()
    counted = copy.deepcopy(plain).to("meta")
    cost = measure_cost(counted, (shape[0], shape[1], shape[2]), 1)
    if not latency:
        return [cost]
    like = next(plain.parameters())
    x = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    seconds = measure_latency([plain], x.to(memory_format=torch.channels_last))
    return [replace(cost, latency_s=seconds[0])]


def print_results(results: Sequence[LevelResult], console: Console | None = None) -> None:
    """Prints the table, with the columns that are known."""
    columns: list[tuple[str, Callable[[LevelResult], str]]] = [
        ("level", lambda r: str(r.level)),
        ("acc %", lambda r: f"{100 * (r.accuracy or 0):.2f}"),
        ("params", lambda r: f"{r.params:,}"),
        ("MACs M", lambda r: f"{r.macs / 1e6:.2f}"),
        ("weights KiB", lambda r: f"{r.weight_bytes / 1024:.1f}"),
        ("peak KiB", lambda r: f"{r.peak_bytes / 1024:.1f}"),
        ("ms", lambda r: f"{1e3 * (r.latency_s or 0):.3f}"),
    ]
    missing = {
        "acc %": all(r.accuracy is None for r in results),
        "ms": all(r.latency_s is None for r in results),
    }
    shown = [(name, text) for name, text in columns if not missing.get(name, False)]
    table = Table(box=SIMPLE)
    table.add_column("task")
    for name, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.task, *(text(result) for _, text in shown))
    (console or Console()).print(table)


def evaluate_checkpoint(
    path: str,
    *,
    data: str | None = None,
    accuracy: bool = True,
    latency: bool = True,
    limit_test: int | None = None,
    device: str = "auto",
    backend: str | None = None,
) -> list[LevelResult]:
    """Accuracy and costs of every (task, level) of what a run left behind.

    Args:
        path: the run's folder, or a file in it.
        data: folder of the data sets; by default the run's own.
        accuracy: run the test images.
        latency: measure the time of one image a level.
        limit_test: at most this many test images of each task; by default as in the run.
        device: see :func:`pyeff.train.processes.choose_device`.
        backend: force one backend of the operators, see :func:`pyeff.backend`.

    Returns:
        One entry a task and level.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or has no tasks; the data is missing, broken, or of other classes.
    """
    tensors, meta = read_archive(path)
    if "tasks" not in meta or "config" not in meta:
        raise ValueError(f"eval: {path} must be of a run of pyeff train, got a model alone")
    model = rebuild(tensors, meta, path).to(choose_device(device))
    config = config_from_json(meta["config"])
    settings: dict[str, Any] = {"data": data if data is not None else config.data}
    if limit_test is not None:
        settings["limit_test"] = limit_test
    found = None
    with forced_backend(backend) if backend else contextlib.nullcontext():
        if accuracy:
            tasks = load_config_tasks(replace(config, **settings))
            found = evaluate(model, [_as_trained(task, meta["tasks"]) for task in tasks])
        shapes = {name: task["image_shape"] for name, task in meta["tasks"].items()}
        return level_results(model, shapes, found, measure_latency=latency)


def _as_trained(task: TaskData, described: Mapping[str, Any]) -> TaskData:
    """A task's data with the normalisation that the network was trained with."""
    before = described.get(task.name)
    if before is None or before["classes"] != list(task.class_names):
        raise ValueError(
            f"eval: data of task {task.name!r} must have the classes of the run, got "
            f"{len(task.class_names)} others"
        )
    return replace(task, mean=tuple(before["mean"]), std=tuple(before["std"]))


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
    save(
        result.model, out / MODEL_FILE_NAME, extra={"tasks": described, "config": config.to_json()}
    )
    document: dict[str, Any] = {
        "config": config.to_json(),
        "seconds": result.seconds,
        "results": [line.to_json() for line in results],
    }
    write_bytes_atomically(out / "results.json", (json.dumps(document, indent=2) + "\n").encode())
    plot_levels(results, out / "levels.png")
