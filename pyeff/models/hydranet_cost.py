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
    """A part of a HydraNet: parameters held, and multiply-adds for one image where it runs."""

    params: int
    macs: int


@dataclass(frozen=True)
class HydraCost:
    """What a HydraNet costs for one image.

    Attributes:
        k: how many branches run.
        macs: multiply-adds of convolutions and linear layers with k branches (1 MAC = 2 FLOP).
        params: parameters of the whole network, with all branches.
        stem: the stem.
        gate: the gate with its last linear layers.
        branch: one branch.
        combiner: all projections and the bias; multiply-adds of one projection.
    """

    k: int
    macs: int
    params: int
    stem: PartCost
    gate: PartCost
    branch: PartCost
    combiner: PartCost


def hydra_cost(model: HydraNet, image: tuple[int, int, int], k: int) -> HydraCost:
    """Counts a HydraNet on images (channels, height, width): see ``HydraNet.costs``."""
    stem, features = _count(copy.deepcopy(model.stem), image)
    body, width = _count(copy.deepcopy(model.gate.body), features)
    top_k, _ = _count(copy.deepcopy(model.gate.top_k.score), width)
    extra = model.gate.top_k.noise  # runs in training only
    held = 0 if extra is None else sum(p.numel() for p in extra.parameters())
    gate = PartCost(body.params + top_k.params + held, body.macs + top_k.macs)
    branch, _ = _count(model.branches.template(), features)
    combiner = PartCost(
        sum(p.numel() for p in model.combiner.parameters()),
        model.combiner.features * model.combiner.classes,
    )
    macs = stem.macs + gate.macs + k * (branch.macs + combiner.macs)
    params = stem.params + gate.params + model.n_b * branch.params + combiner.params
    return HydraCost(k, macs, params, stem, gate, branch, combiner)


def _count(part: nn.Module, source: tuple[int, ...]) -> tuple[PartCost, tuple[int, ...]]:
    """The cost of a part of torch layers on one ``source``, and the shape that it makes."""
    part = part.to("meta").eval()
    layers, _ = layer_costs(part, source)
    params = list(part.parameters())
    dtype = params[0].dtype if params else None
    with torch.no_grad():
        result = part(torch.empty(1, *source, device="meta", dtype=dtype))
    cost = PartCost(sum(p.numel() for p in params), sum(layer.macs for layer in layers))
    return cost, tuple(result.shape[1:])
