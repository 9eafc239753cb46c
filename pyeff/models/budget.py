"""From a budget to a level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pyeff.measure import LevelCost, measure_cost, measure_latency
from pyeff.models.materialise import plan_level
from pyeff.models.resnet import ResNet

if TYPE_CHECKING:
    from pyeff.models.nested_resnet import NestedResNet

_MEASURES: dict[str, Callable[[LevelCost], float | None]] = {
    "max_params": lambda cost: cost.params,
    "max_macs": lambda cost: cost.macs,
    "max_memory": lambda cost: cost.memory_bytes,
    "max_latency": lambda cost: cost.latency_s,
}


def level_costs(
    model: NestedResNet,
    task: str | int | None,
    input_size: int | tuple[int, int] | None,
    latency: bool,
) -> list[LevelCost]:
    """What each level of a task costs: see ``NestedResNet.costs``."""
    image = _image(model, task, input_size)
    weight = next(model.parameters())
    costs = []
    for level in range(1, model.levels + 1):
        active = model.activate(task, level)
        with torch.device("meta"):
            plain = ResNet(plan_level(model, active)).to(weight.dtype).eval()
        kept = _kept(model, level) if model.options.masked else None
        costs.append(measure_cost(plain, image, level, kept))
    if not latency:
        return costs
    nets = [model.materialise(task, cost.level).eval() for cost in costs]
    for net in nets:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in stub
    x = torch.randn(1, *image, device=weight.device, dtype=weight.dtype)
    seconds = measure_latency(nets, x.to(memory_format=torch.channels_last))
    return [replace(cost, latency_s=time) for cost, time in zip(costs, seconds, strict=True)]


def pick_level(
    model: NestedResNet,
    task: str | int | None,
    budgets: Mapping[str, float | None],
    input_size: int | tuple[int, int] | None,
) -> int:
    """The largest level within all budgets: see ``NestedResNet.pick``."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if not given:
        raise ValueError(f"pick: one of {', '.join(_MEASURES)} must be given, got none")
    costs = level_costs(model, task, input_size, "max_latency" in given)
    for cost in reversed(costs):
        if all(_value(cost, name) <= limit for name, limit in given.items()):
            return cost.level
    smallest = ", ".join(f"{_value(costs[0], name):g} for {name}" for name in given)
    limits = ", ".join(f"{name}={limit:g}" for name, limit in given.items())
    raise ValueError(
        f"pick: budget must be at least the smallest level's cost ({smallest}), got {limits}"
    )


def _value(cost: LevelCost, name: str) -> float:
    value = _MEASURES[name](cost)
    return float("inf") if value is None else value


def _image(
    model: NestedResNet, task: str | int | None, input_size: int | tuple[int, int] | None
) -> tuple[int, int, int]:
    if input_size is None:
        name = list(model.tasks)[model.activate(task).task]
        input_size = model.options.image_sizes.get(name, model.layout.backbone.input_size)
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(height, width) < 1:
        raise ValueError(f"costs: input_size must be positive, got {input_size}")
    return model.options.in_channels, height, width


def _kept(model: NestedResNet, level: int) -> dict[str, int]:
    """How many weights a level keeps, by the name of the masked layer in the plain network."""
    kept = {}
    for place, index in enumerate(model.blocks_at(level)):
        block = model.block(index)
        for name in block.conv_grids:
            kept[f"blocks.{place}.{name}"] = int(getattr(block, name).mask(level).sum())
    return kept
