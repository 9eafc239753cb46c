"""What a run leaves behind: the final model, the table, the plots, and words for the terminal."""

import contextlib
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyeff.checkpoint import (
    MODEL_FILE_NAME,
    read_archive,
    rebuild,
    save,
    write_bytes_atomically,
)
from pyeff.measure import LevelCost, measure_cost, measure_latency
from pyeff.measure.memory import peak_activation_bytes
from pyeff.models.expansion import ExpandableNet, as_it_runs
from pyeff.models.hydranet import HydraNet
from pyeff.models.nested_resnet import NestedResNet
from pyeff.ops import backend as forced_backend
from pyeff.train.branch_plots import plot_branches, plot_use
from pyeff.train.compression_report import write_compression
from pyeff.train.config import TrainConfig, config_from_json
from pyeff.train.evaluate import Accuracies, LevelResult, evaluate
from pyeff.train.gate_statistics import GateSummary, statistics_of
from pyeff.train.network import is_supervised, lay_out
from pyeff.train.optimizer import decayed_names
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
    gate: GateSummary | None = None,
) -> list[LevelResult]:
    """Costs and accuracy of every (task, level).

    Args:
        model: nested, or a plain backbone.
        image_shapes: task name to ``(C, H, W)``.
        accuracy: what :func:`pyeff.train.evaluate` gave.
        measure_latency: run each level and take its time.
        gate: of a HydraNet, what its gate did with the test images.

    Returns:
        One entry a task and level, in the order of the tasks.
    """
    results = []
    class_means = accuracy.class_mean if isinstance(accuracy, Accuracies) else {}
    for task, shape in image_shapes.items():
        for cost in _costs(model, task, shape, measure_latency):
            results.append(
                LevelResult(
                    task=task,
                    level=cost.level,
                    accuracy=None if accuracy is None else accuracy[task, cost.level],
                    class_mean=class_means.get((task, cost.level)),
                    params=cost.params,
                    macs=cost.macs,
                    weight_bytes=cost.weight_bytes,
                    peak_bytes=cost.peak_bytes,
                    latency_s=cost.latency_s,
                    gate=None if gate is None else gate.to_json(),
                )
            )
    return results


def _costs(model: nn.Module, task: str, shape: Sequence[int], latency: bool) -> list[LevelCost]:
    if isinstance(model, NestedResNet):
        return model.costs(task, input_size=(shape[1], shape[2]), latency=latency)
    if isinstance(model, ExpandableNet):
        model = as_it_runs(model)
    model.eval()
    like = next(model.parameters())
    x = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    x = x.to(memory_format=torch.channels_last)
    if isinstance(model, HydraNet):
        cost = _hydranet_cost(model, x)
    else:
        counted = copy.deepcopy(model).to("meta")
        cost = measure_cost(counted, (shape[0], shape[1], shape[2]), 1)
    if not latency:
        return [cost]
    lay_out(model, torch.channels_last)
    return [replace(cost, latency_s=measure_latency([model], x)[0])]


def _hydranet_cost(model: HydraNet, x: Tensor) -> LevelCost:
    """A HydraNet's cost as that of a level: all branches weigh, k of them compute."""
    cost = model.costs((x.shape[2], x.shape[3]))
    tensors = [*model.parameters(), *model.buffers()]
    weighted = decayed_names(model)
    return LevelCost(
        level=1,
        params=cost.params,
        conv_fc_params=sum(p.numel() for n, p in model.named_parameters() if n in weighted),
        macs=cost.macs,
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors),
        peak_bytes=peak_activation_bytes(model, x),
    )


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
    console = console or Console()
    console.print(table)
    print_class_means(results, console)
    for result in results:
        if result.gate is not None:
            print_gate(result.gate, console)


def print_class_means(results: Sequence[LevelResult], console: Console) -> None:
    """Prints the mean over the classes where it is another number than the accuracy.

    It is the same where all classes have as many test images.

    Args:
        results: the table.
        console: where.
    """
    for task in dict.fromkeys(result.task for result in results):
        known = [
            (r.level, r.class_mean, r.accuracy)
            for r in results
            if r.task == task and r.class_mean is not None and r.accuracy is not None
        ]
        if any(abs(mean - accuracy) > 1e-9 for _, mean, accuracy in known):
            words = ", ".join(f"level {level} {mean:.2%}" for level, mean, _ in known)
            console.print(f"mean over the classes, {task}: {words}", highlight=False)


def print_gate(gate: Mapping[str, Any], console: Console) -> None:
    """Prints what a HydraNet's gate does: a line for all, a table of the branches.

    Args:
        gate: what :meth:`pyeff.train.gate_statistics.GateSummary.to_json` gave.
        console: where.
    """
    words = []
    if gate["top1"] is not None:
        words += [f"top-1 {gate['top1']:.2%}", f"among the k {gate['topk']:.2%}"]
    words += [f"entropy of use {gate['entropy']:.3f} of log n_b", f"dead {len(gate['dead'])}"]
    console.print("gate: " + ", ".join(words), highlight=False)
    table = Table(box=SIMPLE)
    for heading in ("branch", "use %", "acc %"):
        table.add_column(heading, justify="right")
    for branch, (use, right) in enumerate(zip(gate["use"], gate["branch_accuracy"], strict=True)):
        shown = "-" if right is None else f"{100 * right:.2f}"
        table.add_row(str(branch), f"{100 * use:.2f}", shown)
    console.print(table)


def evaluate_checkpoint(
    path: str,
    *,
    data: str | None = None,
    accuracy: bool = True,
    latency: bool = True,
    limit_test: int | None = None,
    device: str = "auto",
    backend: str | None = None,
    k: int | None = None,
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
        k: of a HydraNet, how many branches run for an image; by default as in training.

    Returns:
        One entry a task and level.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or has no tasks; the data is missing, broken, or of other classes;
            k for another network than a HydraNet, or out of range.
    """
    tensors, meta = read_archive(path)
    if "tasks" not in meta or "config" not in meta:
        raise ValueError(f"eval: {path} must be of a run of pyeff train, got a model alone")
    model = rebuild(tensors, meta, path).to(choose_device(device))
    config = config_from_json(meta["config"])
    settings: dict[str, Any] = {"data": data if data is not None else config.data}
    if limit_test is not None:
        settings["limit_test"] = limit_test
    if k is not None:
        _set_k(model, k)
    found = None
    statistics = statistics_of(model) if isinstance(model, HydraNet) else None
    with forced_backend(backend) if backend else contextlib.nullcontext():
        if accuracy:
            tasks = load_config_tasks(replace(config, **settings))
            tasks = [_as_trained(task, meta["tasks"]) for task in tasks]
            found = evaluate(model, tasks, statistics=statistics)
        shapes = {name: task["image_shape"] for name, task in meta["tasks"].items()}
        seen = statistics.summary() if accuracy and statistics is not None else None
        return level_results(model, shapes, found, measure_latency=latency, gate=seen)


def _set_k(model: nn.Module, k: int) -> None:
    if not isinstance(model, HydraNet):
        raise ValueError(
            f"eval: k must be left out for a network without branches, got {k} for a "
            f"{type(model).__name__}"
        )
    model.k = k


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
        results = level_results(result.model, shapes, result.accuracy, gate=result.gate)
    write_report(trainer.out, trainer.config, trainer.tasks, result, results)
    print_results(results, console)
    if isinstance(result.model, ExpandableNet):
        print_best(best_epochs(result.records), console)
    return result


def best_epochs(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The epoch with the best test accuracy of every (task, level), the first of equal ones.

    It is chosen by the test images, so its accuracy is a flattering one. It stands beside the last
    epoch's because papers report it.

    Args:
        records: lines of ``metrics.jsonl``.

    Returns:
        Dicts of ``task``, ``level``, ``epoch``, ``accuracy``.
    """
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        accuracy, key = record["test_accuracy"], (record["task"], record["level"])
        if accuracy is not None and (key not in best or accuracy > best[key]["accuracy"]):
            best[key] = {
                **dict(zip(("task", "level"), key, strict=True)),
                "epoch": record["epoch"],
                "accuracy": accuracy,
            }
    return list(best.values())


def print_best(best: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints what :func:`best_epochs` found."""
    for found in best:
        (console or Console()).print(
            f"best epoch by the test images, {found['task']}: {found['epoch']}, "
            f"{found['accuracy']:.2%}",
            highlight=False,
        )


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
        "best_epochs": best_epochs(result.records),
    }
    plot_levels(results, out / "levels.png")
    if result.compressed is not None:
        write_compression(out, result.records, result.compressed)
    if result.gate is not None:
        owners = cast(HydraNet, result.model).class_group.tolist()
        gate = result.gate.to_json()
        supervised = is_supervised(cast(HydraNet, result.model))
        plot_use(gate, out / "use.png")
        plot_branches(
            gate,
            tasks[0].class_names,
            out / "branches.png",
            class_groups=owners if supervised else None,
        )
    # The last one: whoever finds it takes the run for finished.
    write_bytes_atomically(out / "results.json", (json.dumps(document, indent=2) + "\n").encode())
