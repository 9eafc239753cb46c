"""What `pyeff demo` does: trains nested and dense networks, measures them, picks a level."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

import pyeff
from pyeff.cli._demo_erfnet import StreetFindings, study_streets
from pyeff.cli._demo_hydranet import HydraFindings, Line, study_hydranet
from pyeff.cli._demo_report import BATCHES, Choice, Findings, print_findings, write_report
from pyeff.measure import measure_latency
from pyeff.models.nested_resnet import NestedResNet
from pyeff.train import LevelResult, TaskData, TrainConfig, Trainer, TrainResult, load_tasks
from pyeff.train.batches import normalise
from pyeff.train.network import build_network
from pyeff.train.plots import plot_levels
from pyeff.train.report import level_results

# Arguments of a nested network's pick().
Budgets = Mapping[str, Any]

TASKS = ("digit=digits:class", "parity=digits:parity")
BACKBONE = "resnet8"
LEVELS = 4


def run_study(out: Path, epochs: int, seed: int, budgets: Budgets, console: Console) -> None:
    """Runs the whole demo and writes everything to one folder.

    Args:
        out: the folder; results of an earlier run in it are replaced.
        epochs: passes over the training images, of every network.
        seed: of weights, order and augmentation.
        budgets: at least one of the arguments of ``pick``.
        console: where the tables go.

    Raises:
        ValueError: no level fits the budget.
        ImportError: the extra ``train`` is missing.
        TrainingInterrupted: SIGINT came.
    """
    tasks = load_tasks(TASKS)
    config = TrainConfig(
        tasks=TASKS,
        model={"family": "dvn", "backbone": BACKBONE, "levels": LEVELS},
        out=str(out / "nested"),
        epochs=epochs,
        seed=seed,
        eval_every=epochs,
        save_every=epochs,
    )
    _check_budgets(config, tasks, budgets)
    console.print(f"Training one nested network: {len(tasks)} tasks, {LEVELS} levels ...")
    nested = Trainer(config, tasks).fit(overwrite=True)
    dense = []
    for task in tasks:
        console.print(f"Training the dense network for task {task.name} alone ...")
        alone = replace(
            config,
            tasks=(task.spec,),
            model={"family": "backbone", "backbone": BACKBONE},
            out=str(out / f"dense_{task.name}"),
        )
        dense.append(Trainer(alone, [task]).fit(overwrite=True))
    console.print(f"Training the HydraNet for task {tasks[0].name} ...")
    hydranet = _study_hydranet(config, tasks[0], dense[0])
    console.print("Training ERFNet on drawn streets ...")
    streets = _study_streets(out / "streets", epochs, seed)
    findings = _compare(config, tasks, (nested, dense), budgets, (hydranet, streets))
    print_findings(findings, console)
    plot_levels(findings.nested, out / "levels.png", dense=findings.dense)
    write_report(findings, out / "levels.png", out / "report.html")
    console.print(f"Report: {out / 'report.html'}", highlight=False)


def _check_budgets(config: TrainConfig, tasks: list[TaskData], budgets: Budgets) -> None:
    """Fails at once on a budget that no level meets; latencies are not known yet."""
    known = {name: value for name, value in budgets.items() if name != "max_latency"}
    if known:
        model = cast(NestedResNet, build_network(config.model, tasks))
        for task in tasks:
            model.pick(task.name, **known, input_size=task.image_shape[1:])


def _compare(
    config: TrainConfig,
    tasks: list[TaskData],
    results: tuple[TrainResult, list[TrainResult]],
    budgets: Budgets,
    others: tuple[HydraFindings, StreetFindings | str],
) -> Findings:
    """Costs, latencies and the choice of a level."""
    nested, dense = results
    hydranet, streets = others
    model = cast(NestedResNet, nested.model)
    levels: list[LevelResult] = []
    alone: list[LevelResult] = []
    seconds: dict[tuple[str, int, int], tuple[float | None, float]] = {}
    choices: list[Choice] = []
    for task, other in zip(tasks, dense, strict=True):
        shapes = {task.name: task.image_shape}
        mine = level_results(model, shapes, nested.accuracy)
        levels += mine
        alone += level_results(other.model, shapes, other.accuracy)
        seconds |= _time(model, task, other.model)
        choices.append(_choose(model, task, nested, mine, budgets))
    facts = pyeff.info()
    training = nested.seconds + sum(result.seconds for result in dense) + hydranet.seconds
    training += 0.0 if isinstance(streets, str) else streets.seconds
    return Findings(
        nested=levels,
        dense=alone,
        seconds=seconds,
        choices=choices,
        budget=_budget_words(budgets),
        recipe=(
            f"A {BACKBONE} with {LEVELS} levels learned {len(tasks)} tasks on "
            f"{len(tasks[0].train_labels):,} of the 8 x 8 digits that scikit-learn bundles, in "
            f"{config.epochs} epochs; accuracy is that on the {len(tasks[0].test_labels)} others."
        ),
        machine=(
            f"pyeff {facts['version']}, torch {facts['torch']}, {facts['isa']} kernels, "
            f"{facts['threads']} threads, seed {config.seed}, {training:.0f} s of training"
        ),
        hydranet=hydranet,
        streets=streets,
    )


def _study_streets(out: Path, epochs: int, seed: int) -> StreetFindings | str:
    """ERFNet's part, or what keeps it from being evaluated: the rest of the demo needs it not."""
    try:
        return study_streets(out, epochs, seed)
    except ImportError as error:
        return str(error)


def _study_hydranet(config: TrainConfig, task: TaskData, dense: TrainResult) -> HydraFindings:
    """The HydraNet beside the dense network of the same task, which clusters its classes."""
    alone = replace(
        config,
        tasks=(task.spec,),
        model={"family": "backbone", "backbone": BACKBONE},
        out=str(Path(config.out).with_name(f"dense_{task.name}")),
    )
    (line,) = level_results(dense.model, {task.name: task.image_shape}, dense.accuracy)
    row = Line("dense, alone", dense.accuracy[task.name, 1], line.macs, {})
    return study_hydranet(alone, task, row, dense.model)


def _time(
    model: NestedResNet, task: TaskData, dense: nn.Module
) -> dict[tuple[str, int, int], tuple[float | None, float]]:
    """Every level, nested and taken out, and the dense network, measured in turn."""
    levels = range(1, model.levels + 1)
    plain = [model.materialise(task.name, level).eval() for level in levels]
    for net in plain:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in stub
    nested = [partial(model, task=task.name, level=level) for level in levels]
    like = next(model.parameters())
    seconds: dict[tuple[str, int, int], tuple[float | None, float]] = {}
    for images in BATCHES:
        x = torch.randn(images, *task.image_shape, device=like.device, dtype=like.dtype)
        x = x.to(memory_format=torch.channels_last)
        times = measure_latency([*nested, *plain, dense], x, repeats=50, warmup=5)
        for level in levels:
            pair = (times[level - 1], times[len(nested) + level - 1])
            seconds[task.name, level, images] = pair
        seconds[task.name, 0, images] = (None, times[-1])
    return seconds


def _choose(
    model: NestedResNet,
    task: TaskData,
    nested: TrainResult,
    lines: list[LevelResult],
    budgets: Budgets,
) -> Choice:
    """Picks the level for the budget, takes it out, and holds it against the nested network."""
    level = model.pick(task.name, **budgets, input_size=task.image_shape[1:])
    line = lines[level - 1]
    plain = model.materialise(task.name, level).eval()
    like = next(model.parameters())
    x = normalise(task.test_images.to(like.device), task.mean, task.std).to(like.dtype)
    with torch.inference_mode():
        difference = (model(x, task=task.name, level=level) - plain(x)).abs().max()
    return Choice(
        task=task.name,
        level=level,
        params=line.params,
        macs=line.macs,
        accuracy=nested.accuracy[task.name, level],
        difference=float(difference),
    )


def _budget_words(budgets: Budgets) -> str:
    forms = {
        "max_params": "{:,} parameters",
        "max_macs": "{:,} MACs",
        "max_memory": "{:,} bytes",
        "max_latency": "{:g} s for one image",
    }
    return " and ".join(forms[name].format(value) for name, value in budgets.items())
