"""One level of a nested network as a plain network of torch layers, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyeff.models.layout import Active
from pyeff.models.resnet import Plan, ResNet, plan_of
from pyeff.nn import (
    NestedBatchNorm2d,
    NestedConv2d,
    NestedLinear,
    NestedMaskedConv2d,
    Range,
)

if TYPE_CHECKING:
    from pyeff.models.nested_resnet import NestedResNet


def plan_level(model: NestedResNet, active: Active) -> Plan:
    """The sizes of the plain network that a level is."""
    stem = model.stem_plans[active.task if model.options.task_stems else 0]
    classes = model.classes(active.task, active.level)
    return plan_of(model.layout, active.ranges, stem, classes, model.blocks_at(active.level))


@torch.no_grad()
def materialise_level(model: NestedResNet, active: Active) -> ResNet:
    """A level of a task as a plain network, equal to the nested forward.

    Args:
        model: the nested network.
        active: what is active, from ``model.activate(task, level)``.

    Returns:
        A network of torch layers with contiguous weights of its own, in the model's mode, dtype and
        on its device.
    """
    weight = next(model.parameters())
    with torch.device("meta"):
        plain = ResNet(plan_level(model, active))
    plain = plain.to(weight.dtype).to_empty(device=weight.device)
    layout, ranges = model.layout, active.ranges
    stem = model.stem_of(active.task)
    copy_conv(plain.stem.conv, stem.conv, active, None, ranges[layout.stem])
    if plain.stem.norm is not None and stem.norm is not None:
        own = active._replace(task=0) if stem.own else active
        copy_norm(plain.stem.norm, stem.norm, own, ranges[layout.stem])
    for target, index in zip(plain.blocks, model.blocks_at(active.level), strict=True):
        block = model.block(index)
        for name, (inputs, outputs) in block.conv_grids.items():
            in_range = ranges[inputs] if layout.groups == 1 else None
            copy_conv(
                getattr(target, name), getattr(block, name), active, in_range, ranges[outputs]
            )
        for name, grid in block.norm_grids.items():
            copy_norm(getattr(target, name), getattr(block, name), active, ranges[grid])
    if plain.norm is not None and model.norm is not None:
        copy_norm(plain.norm, model.norm, active, ranges[layout.features])
    head = model.head_of(active.task, active.level)
    low, high = ranges[layout.features]
    plain.head.weight.copy_(_active_weight(head, active)[:, low:high])
    plain.head.bias.copy_(head.bias)
    return plain.train(model.training)


Weighted = NestedConv2d | NestedLinear | NestedMaskedConv2d


def _active_weight(layer: Weighted, active: Active) -> Tensor:
    if isinstance(layer, NestedMaskedConv2d):
        return layer.masked_weight(active.level)
    return layer.weight


def copy_conv(
    target: nn.Conv2d, layer: Weighted, active: Active, inputs: Range | None, outputs: Range
) -> None:
    """Copies the active part of a nested convolution into a plain one."""
    weight = _active_weight(layer, active)[outputs[0] : outputs[1]]
    if inputs is not None:
        weight = weight[:, inputs[0] : inputs[1]]
    target.weight.copy_(weight)


def copy_norm(
    target: nn.BatchNorm2d, layer: NestedBatchNorm2d, active: Active, channels: Range
) -> None:
    """Copies a task's and level's part of a nested norm into a plain one."""
    mean, var, weight, bias = layer.row(active.task, active.level, channels)
    target.load_state_dict(
        {
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": layer.batches(active.task, active.level),
            "weight": torch.ones_like(mean) if weight is None else weight,
            "bias": torch.zeros_like(mean) if bias is None else bias,
        }
    )
    target.eps, target.momentum = layer.eps, layer.momentum


@torch.no_grad()
def load_backbone(
    model: NestedResNet, backbone: ResNet, task: str | int | None = None
) -> NestedResNet:
    """Copies a plain backbone's weights into a nested network; the full level then equals it.

    Every (task, level) takes over the backbone's norms, cut to its channels. Stem and head go to
    one task where tasks have their own.

    Args:
        model: a network of the same backbone, in slice mode full or inner, by layers or by weights.
        backbone: the plain network.
        task: the task that takes the head (and the stem); may be left out where there is one.

    Returns:
        ``model``.

    Raises:
        ValueError: another backbone, another class count, or slice mode grouped (whose full level
            lacks weights of the backbone).
    """
    active = model.activate(task)._replace(ranges=model.layout.full_ranges())
    expected = plan_level(model, active)
    if model.layout.groups > 1:
        raise ValueError("load_backbone: model must not be of slice mode 'grouped', got it")
    if expected != backbone.plan:
        raise ValueError(
            f"load_backbone: backbone must have the model's sizes {expected}, got {backbone.plan}"
        )
    stem = model.stem_of(active.task)
    stem.conv.weight.copy_(backbone.stem.conv.weight)
    _spread_norm(stem.norm, backbone.stem.norm)
    for index, source in enumerate(backbone.blocks):
        block = model.block(index)
        for name in block.conv_grids:
            getattr(block, name).weight.copy_(getattr(source, name).weight)
        for name in block.norm_grids:
            _spread_norm(getattr(block, name), getattr(source, name))
    _spread_norm(model.norm, backbone.norm)
    for head in model.heads_of(active.task):
        if head.out_features == backbone.head.out_features:
            head.weight.copy_(backbone.head.weight)
            head.bias.copy_(backbone.head.bias)
    return model


def _spread_norm(norm: NestedBatchNorm2d | None, source: nn.BatchNorm2d | None) -> None:
    """Copies a plain norm to every task and level of a nested one."""
    if norm is None or source is None:
        return
    values = source.state_dict()
    for name, target in norm.state_dict().items():
        target.copy_(values[name].expand_as(target))
    norm.eps = source.eps
