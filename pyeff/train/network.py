"""From a run's configuration and its data to the network, and one way to call every network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff import models
from pyeff.models.hydranet import HydraNet
from pyeff.train.tasks import TaskData

# Families of one task; HydraNets are too.
_CLASSIFIERS = (
    *("backbone", "dec3", "decomposeme", "nestednet", "resnet50_decomposed"),
    *("alexnet_small", "mobilenet_v1", "mobilenet_v2", "shufflenet_v2_x0_5", "smallnet"),
)


def build_network(model: Mapping[str, Any], tasks: Sequence[TaskData]) -> nn.Module:
    """Builds a network for some tasks.

    Args:
        model: keyword arguments of :func:`pyeff.models.build` without what the data decides: the
            tasks, their class counts and the image channels.
        tasks: the data.

    Returns:
        The network, with fresh weights.

    Raises:
        ValueError: an unknown family or option, or several tasks for a network of one.
    """
    arguments: dict[str, Any] = {**model, "in_channels": tasks[0].image_shape[0]}
    family = model.get("family")
    if family not in _CLASSIFIERS and not is_hydranet_family(family):
        arguments["tasks"] = {task.name: task.classes for task in tasks}
        return models.build(arguments)
    arguments["classes"] = only_task(model, tasks).classes
    if family == "nestednet":
        arguments["task"] = tasks[0].name
    elif family == "smallnet":
        arguments["image_size"] = _side(tasks[0])
    elif "backbone" in arguments:
        arguments["name"] = arguments.pop("backbone")
    return models.build(arguments)


def _side(task: TaskData) -> int:
    """Rows and columns of a task's images."""
    _, height, width = task.image_shape
    if height != width:
        raise ValueError(f"train: smallnet must have square images, got {height} x {width}")
    return height


def only_task(model: Mapping[str, Any], tasks: Sequence[TaskData]) -> TaskData:
    """The one task of a network that has one.

    Raises:
        ValueError: there are several.
    """
    if len(tasks) != 1:
        raise ValueError(
            f"train: {model.get('family')} must have one task, got "
            f"{[task.name for task in tasks]}: train one for each, or a dvn for all"
        )
    return tasks[0]


def is_hydranet_family(family: object) -> bool:
    """Whether a family of :func:`pyeff.models.build` is a HydraNet."""
    return isinstance(family, str) and family.startswith("hydranet_")


def is_supervised(model: HydraNet) -> bool:
    """Whether the gate learns which branch owns an image's class, rather than from the task."""
    return bool(model.config["gate"] == "supervised")


def levels_of(model: nn.Module) -> int:
    """How many levels a network has; a plain one has 1."""
    return int(getattr(model, "levels", 1))


def call(model: nn.Module, x: Tensor, task: str, level: int) -> Tensor:
    """Runs a network as a task at a level; a plain one knows neither.

    Args:
        model: a nested network, or a plain one.
        x: images ``[N, C, H, W]``.
        task: name.
        level: from 1.

    Returns:
        Logits ``[N, classes]``.
    """
    if hasattr(model, "levels"):
        return model(x, task=task, level=level)
    return model(x)


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Puts every weight ``[O, C, kh, kw]`` of a network into a memory format."""
    # Not .to(): that asks stacked weights [B, O, C, kh, kw] too, which have no such format.
    model._apply(lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)
