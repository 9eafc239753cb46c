"""Times of expanded SmallNets: contracted, at run time, and in training in both forms.

Part of expandnets_cifar.py. All candidates run in every round, on the same images; what counts is
the ratio within a round.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timing import Candidate, compare, markdown_table, prefer_this_process
from torch import Tensor, nn
from torch.nn import functional

import pyeff
from pyeff.convert import contract
from pyeff.train import TaskData
from pyeff.train.batches import normalise
from pyeff.train.network import build_network, lay_out
from pyeff.train.optimizer import build_optimizer

BATCHES = (1, 128)
FORMS = ("expanded", "contracted")


def time_inference(
    folders: Mapping[str, Path], task: TaskData, threads: int, *, max_seconds: float = 20.0
) -> list[dict[str, Any]]:
    """Times every arm's contracted network, in float32.

    Args:
        folders: of finished runs, by the arm's name.
        task: whose test images run.
        threads: of torch.
        max_seconds: for each batch.

    Returns:
        One row a batch and arm; ``over_baseline`` is how many times longer it takes.
    """
    prefer_this_process()
    torch.set_num_threads(threads)
    models = {arm: contract(pyeff.load(folder)).eval() for arm, folder in folders.items()}
    for model in models.values():
        lay_out(model, torch.channels_last)
    rows = []
    for images in BATCHES:
        x = normalise(task.test_images[:images], task.mean, task.std)
        candidates = {arm: _forward(model, x) for arm, model in models.items()}
        with torch.inference_mode():
            found = compare(candidates, max_seconds=max_seconds)
        for arm in models:
            row = {"network": arm, "images": images, "threads": threads, "clean": found.clean}
            row["ms_per_image"] = 1e3 * found.time(arm).median / images
            if "baseline" in models:
                row["over_baseline"] = vars(found.speedup("baseline", arm))
            rows.append(row)
    return rows


def _forward(model: nn.Module, x: Tensor) -> Candidate:
    def call() -> object:
        return model(x)

    return call


def time_steps(
    models: Mapping[str, Mapping[str, Any]],
    task: TaskData,
    batch: int,
    threads: int,
    *,
    max_seconds: float = 60.0,
) -> list[dict[str, Any]]:
    """Times a training step of every arm in both forms, in float32.

    Args:
        models: options of the networks, by the arm's name; one without expanded layers has no
            form.
        task: whose training images run.
        batch: images a step.
        threads: of torch.
        max_seconds: for all of them.

    Returns:
        One row an arm and form: milliseconds a step, how many times longer it takes than the
        baseline's, and how many times longer than the contracted form's.
    """
    prefer_this_process()
    torch.set_num_threads(threads)
    x = normalise(task.train_images[:batch], task.mean, task.std)
    y = task.train_labels[:batch]
    candidates: dict[str, Candidate] = {}
    for arm, options in models.items():
        for form in FORMS if options["expand"] else ("plain",):
            model = build_network({**options, "form": "auto" if form == "plain" else form}, [task])
            candidates[f"{arm}: {form}"] = _step(model, x, y)
    found = compare(candidates, max_seconds=max_seconds)
    rows = []
    for name in candidates:
        arm, form = name.split(": ")
        row = {"network": arm, "form": form, "images": batch, "threads": threads}
        row |= {"ms": 1e3 * found.time(name).median, "clean": found.clean}
        if "baseline: plain" in candidates:
            row["over_baseline"] = vars(found.speedup("baseline: plain", name))
        if form == "expanded":
            row["over_contracted"] = vars(found.speedup(f"{arm}: contracted", name))
        rows.append(row)
    return rows


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Candidate:
    """A forward and a backward pass and an optimiser's step that moves nothing."""
    model.train()
    lay_out(model, torch.channels_last)
    optimizer = build_optimizer(model, lr=0.0, momentum=0.9, weight_decay=0.0)

    def call() -> object:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(cast(Tensor, model(x)), y)
        loss.backward()
        optimizer.step()
        return loss

    return call


def _ratio(row: Mapping[str, Any], key: str) -> str:
    found = row.get(key)
    return f"{found['median']:.2f} [{found['p10']:.2f}..{found['p90']:.2f}]" if found else ""


def markdown_inference(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`time_inference` as a table."""
    lines = [
        [
            row["network"],
            row["images"],
            f"{row['ms_per_image']:.4f}",
            _ratio(row, "over_baseline"),
            "" if row["clean"] else "yes",
        ]
        for row in rows
    ]
    columns = ["contracted network", "batch", "ms an image", "over the baseline", "disturbed"]
    return markdown_table(columns, lines)


def markdown_steps(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`time_steps` as a table."""
    lines = [
        [
            row["network"],
            row["form"],
            f"{row['ms']:.1f}",
            _ratio(row, "over_baseline"),
            _ratio(row, "over_contracted"),
            "" if row["clean"] else "yes",
        ]
        for row in rows
    ]
    columns = ["network", "form", "ms a step", "over the baseline", "over contracted", "disturbed"]
    return markdown_table(columns, lines)
