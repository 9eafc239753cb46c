"""Which branch of a HydraNet owns which class: by a reference classifier, at random, by a file."""

import json
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.checkpoint import read_archive, rebuild, write_bytes_atomically
from pyeff.models.build import FAMILIES
from pyeff.models.hydranet import partition_classes
from pyeff.train.batches import normalise
from pyeff.train.config import TrainConfig
from pyeff.train.evaluate import evaluating
from pyeff.train.network import call, is_hydranet_family, levels_of
from pyeff.train.processes import Processes
from pyeff.train.tasks import TaskData

PARTITION_FILE_NAME = "partition.json"
REFERENCE_FOLDER = "reference"


def needs_partition(model: Mapping[str, Any]) -> bool:
    """Whether a network's gate learns from groups of classes, and these are not given yet.

    Args:
        model: keyword arguments of :func:`pyeff.models.build`.
    """
    return (
        is_hydranet_family(model.get("family"))
        and model.get("gate", "supervised") == "supervised"
        and model.get("class_groups") is None
    )


def branches_of(model: Mapping[str, Any]) -> int:
    """How many branches a HydraNet's configuration asks for, by its family's default if by none.

    Raises:
        ValueError: an unknown family.
    """
    if "n_b" in model:
        return int(model["n_b"])
    if model["family"] not in FAMILIES:
        raise ValueError(
            f"partition: family must be one of {', '.join(FAMILIES)}, got {model['family']!r}"
        )
    return int(signature(FAMILIES[model["family"]]).parameters["n_b"].default)


def with_groups(config: TrainConfig, groups: list[int] | None) -> TrainConfig:
    """The run with its partition in the network's configuration, where checkpoints keep it."""
    return replace(config, model={**config.model, "class_groups": groups})


def groups_of_checkpoint(path: Path) -> list[int] | None:
    """The partition that a run's checkpoint holds; ``None`` where its network has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    found: list[int] | None = read_archive(path)[1]["model"].get("class_groups")
    return found


def reference_config(config: TrainConfig) -> TrainConfig:
    """The run that trains a HydraNet's reference classifier: the same recipe, a plain backbone."""
    return replace(
        config,
        model={"family": "backbone", "backbone": config.reference_backbone},
        out=str(Path(config.out) / REFERENCE_FOLDER),
        epochs=config.reference_epochs or config.epochs,
        teacher_forcing_epochs=0,
    )


def partition(
    config: TrainConfig,
    task: TaskData,
    processes: Processes,
    reference: tuple[nn.Module, TaskData] | None,
) -> list[int]:
    """Divides a task's classes among a HydraNet's branches, and writes ``partition.json``.

    Args:
        config: the run.
        task: its data.
        processes: all get the first one's partition.
        reference: for ``partition="auto"``: a classifier of the task, and the data as it sees it.

    Returns:
        The branch that owns each class.

    Raises:
        FileNotFoundError, ValueError: the partition's file is missing, broken, or of other classes
            or branches; more branches than classes.
    """
    n_b = branches_of(config.model)
    method = config.partition
    if method == "random":
        outputs = torch.zeros(task.classes, 1)
        groups = partition_classes(outputs, n_b, method="random", seed=config.seed)
    elif method == "auto":
        if reference is None:
            raise ValueError("partition: reference must be a classifier for auto, got None")
        outputs = mean_class_outputs(*reference)
        method = config.partition_method
        groups = partition_classes(outputs, n_b, method=method, seed=config.seed)
    else:
        groups = torch.tensor(read_partition(Path(method), task, n_b))
        method = "file"
    # Sums may differ between processes' devices, and with them a nearest centroid.
    found: list[int] = processes.of_first(groups).tolist()
    if processes.first:
        write_partition(Path(config.out) / PARTITION_FILE_NAME, task, found, n_b, method)
    return found


def mean_class_outputs(model: nn.Module, task: TaskData, *, batch_size: int = 500) -> Tensor:
    """Each class's mean output of a classifier's final layer, over its training images.

    Args:
        model: a classifier of the task (a nested one: its largest level).
        task: the data; the images are not augmented.
        batch_size: images a call.

    Returns:
        float64 ``[classes, outputs]`` on the CPU.

    Raises:
        ValueError: a class has no training image.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, section 3.1.
    """
    counts = torch.bincount(task.train_labels, minlength=task.classes)
    if not bool(counts.all()):
        missing = task.class_names[int((counts == 0).nonzero()[0])]
        raise ValueError(
            f"partition: every class must have a training image, got none of class {missing!r}"
        )
    like = next(model.parameters())
    sums: Tensor | None = None
    with evaluating(model):
        for begin in range(0, len(task.train_labels), batch_size):
            images = task.train_images[begin : begin + batch_size].to(like.device)
            x = normalise(images, task.mean, task.std).to(like.dtype)
            out = call(model, x, task.name, levels_of(model)).double().cpu()
            if sums is None:
                sums = torch.zeros(task.classes, out.shape[1], dtype=torch.float64)
            sums.index_add_(0, task.train_labels[begin : begin + batch_size], out)
    if sums is None:
        raise ValueError("partition: task must have training images, got none")
    return sums / counts.unsqueeze(1)


def load_reference(path: str, task: TaskData, device: torch.device) -> tuple[nn.Module, TaskData]:
    """A trained classifier, and the task's data with that classifier's normalisation.

    Args:
        path: the folder of a run of ``pyeff train``, or a file in it.
        task: the data.
        device: where to run it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no run of ``pyeff train``, or has no task of these classes.
    """
    tensors, meta = read_archive(path)
    described = {
        name: found
        for name, found in meta.get("tasks", {}).items()
        if found["classes"] == list(task.class_names)
    }
    if not described:
        raise ValueError(
            f"partition: reference must be a run of pyeff train on the {task.classes} classes of "
            f"{task.name}, got {path}, which has none"
        )
    name, found = next(iter(described.items()))
    model = rebuild(tensors, meta, path).to(device)
    return model, replace(task, name=name, mean=tuple(found["mean"]), std=tuple(found["std"]))


def write_partition(path: Path, task: TaskData, groups: list[int], n_b: int, method: str) -> None:
    """Writes a partition as JSON: the branch of each class by its number, and each branch's names.

    Args:
        path: the file to write or replace.
        task: whose classes.
        groups: the branch that owns each class.
        n_b: number of branches.
        method: how it was made.
    """
    document = {
        "n_b": n_b,
        "method": method,
        "class_groups": groups,
        "classes": list(task.class_names),
        "branches": [
            [task.class_names[c] for c, branch in enumerate(groups) if branch == b]
            for b in range(n_b)
        ],
    }
    write_bytes_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def read_partition(path: Path, task: TaskData, n_b: int) -> list[int]:
    """Reads what :func:`write_partition` wrote; of its keys only ``class_groups`` is needed.

    Args:
        path: the file.
        task: whose classes it shall divide.
        n_b: number of branches.

    Returns:
        The branch that owns each class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object with ``class_groups``, or does not fit the task or n_b.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"partition: partition must be auto, random or a JSON file, got {path}"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        groups = document["class_groups"]
        whole = all(type(branch) is int for branch in groups)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"partition: {path} must be a JSON object with class_groups, got another ({error})"
        ) from error
    if not whole or len(groups) != task.classes:
        raise ValueError(
            f"partition: class_groups of {path} must be {task.classes} whole numbers, one for each "
            f"class of {task.name}, got {len(groups)} entries"
        )
    named = document.get("classes")
    if named is not None and list(named) != list(task.class_names):
        raise ValueError(
            f"partition: classes of {path} must be those of {task.name}, in their order, got others"
        )
    if set(groups) != set(range(n_b)):
        raise ValueError(
            f"partition: class_groups of {path} must use each of the {n_b} branches, 0 to "
            f"{n_b - 1}, got {sorted(set(groups))}"
        )
    return list(groups)
