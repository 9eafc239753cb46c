"""From a run's configuration and its data to the network, and one way to call every network."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyeff import models
from pyeff.train.tasks import TaskData


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
    if family not in ("backbone", "nestednet"):
        arguments["tasks"] = {task.name: task.classes for task in tasks}
        return models.build(arguments)
    if len(tasks) != 1:
        raise ValueError(
            f"train: {family} must have one task, got {[task.name for task in tasks]}: train one "
            "for each, or a dvn for all"
        )
    arguments["classes"] = tasks[0].classes
    if family == "nestednet":
        arguments["task"] = tasks[0].name
    elif "backbone" in arguments:
        arguments["name"] = arguments.pop("backbone")
    return models.build(arguments)


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
