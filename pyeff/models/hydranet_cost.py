"""What a HydraNet costs, by part."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyeff.measure import layer_costs

if TYPE_CHECKING:
    from pyeff.models.hydranet import HydraNet


@dataclass(frozen=True)
class PartCost:
    """A part of a HydraNet.

    Attributes:
        params: parameters: weights, biases, norms' scales and shifts.
        conv_fc_params: weights of convolutions and linear layers only.
        macs: multiply-adds for one image, where the part runs.
    """

    params: int
    conv_fc_params: int
    macs: int


@dataclass(frozen=True)
class HydraCost:
    """What a HydraNet costs for one image.

    Attributes:
        k: how many branches run.
        macs: multiply-adds of convolutions and linear layers with k branches (1 MAC = 2 FLOP).
        params: parameters of the whole network, with all branches.
        conv_fc_params: of these, the weights of convolutions and linear layers.
        stem: the stem.
        gate: the gate with its last linear layers.
        branch: one branch.
        combiner: all projections and the bias; multiply-adds of one projection.
    """

    k: int
    macs: int
    params: int
    conv_fc_params: int
    stem: PartCost
    gate: PartCost
    branch: PartCost
    combiner: PartCost


def hydra_cost(model: HydraNet, image: tuple[int, int, int], k: int) -> HydraCost:
    """Counts a HydraNet on images (channels, height, width): see ``HydraNet.costs``."""
    stem, features = _count(copy.deepcopy(model.stem), image)
    body, width = _count(copy.deepcopy(model.gate.body), features)
    top_k, _ = _count(copy.deepcopy(model.gate.top_k.score), width)
    gate = [body, top_k]
    if model.gate.top_k.noise is not None:  # runs in training only
        held = model.gate.top_k.noise.weight.numel()
        gate.append(PartCost(held, held, 0))
    branch, _ = _count(model.branches.template(), features)
    last = model.combiner
    held = last.weight.numel()
    bias = 0 if last.bias is None else last.bias.numel()
    combiner = PartCost(held + bias, held, last.features * last.classes)
    parts = [stem, *gate, combiner, *[branch] * model.n_b]
    return HydraCost(
        k=k,
        macs=stem.macs + sum(part.macs for part in gate) + k * (branch.macs + combiner.macs),
        params=sum(part.params for part in parts),
        conv_fc_params=sum(part.conv_fc_params for part in parts),
        stem=stem,
        gate=_sum(gate),
        branch=branch,
        combiner=combiner,
    )


def _sum(parts: list[PartCost]) -> PartCost:
    return PartCost(
        sum(part.params for part in parts),
        sum(part.conv_fc_params for part in parts),
        sum(part.macs for part in parts),
    )


def _count(part: nn.Module, source: tuple[int, ...]) -> tuple[PartCost, tuple[int, ...]]:
    """The cost of a part of torch layers on one ``source``, and the shape that it makes."""
    part = part.to("meta").eval()
    layers, _ = layer_costs(part, source)
    params = list(part.parameters())
    dtype = params[0].dtype if params else None
    with torch.no_grad():
        result = part(torch.empty(1, *source, device="meta", dtype=dtype))
    weights = sum(
        layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    )
    cost = PartCost(sum(p.numel() for p in params), weights, sum(layer.macs for layer in layers))
    return cost, tuple(result.shape[1:])
