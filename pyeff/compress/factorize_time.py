"""Whether pairs are faster than the layers whose places they would take, by measured time."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pyeff.compress.factorize_report import LayerFactors
from pyeff.compress.layer_calls import Example, output_of
from pyeff.measure import measure_latency
from pyeff.models.described import replace_layer
from pyeff.nn.folding import FoldsNorms

_Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """A layer and the pair that may take its place.

    Attributes:
        layer: the layer.
        pair: the two layers.
        shapes: of the inputs that the layer is called with.
    """

    layer: nn.Module
    pair: nn.Module
    shapes: _Shapes


def keep_faster(
    model: nn.Module,
    example: Example,
    candidates: Mapping[str, Candidate],
    results: Mapping[str, LayerFactors],
) -> dict[str, LayerFactors]:
    """Adds measured seconds to results, and for pairs that are not faster why the layer stays.

    A layer is measured alone. Members of one that runs them as one call
    (:class:`~pyeff.nn.FactorizedConv2d`, :class:`~pyeff.nn.ConvNorm2d`) are measured within it, in
    every choice of members to be factored, of which the fastest is taken.

    Args:
        model: the network.
        example: the arguments of a forward pass.
        candidates: by the layers' names.
        results: what is known of the same layers.
    """
    owners = _owners(model, candidates)
    shapes = _shapes_of_calls(model, example, set(owners.values()))
    found: dict[str, LayerFactors] = {}
    groups: dict[str, dict[str, Candidate]] = {}
    for name, candidate in candidates.items():
        groups.setdefault(owners.get(name, name), {})[name] = candidate
    for place, group in groups.items():
        about = {name: results[name] for name in group}
        if place in group:
            found[place] = _alone(about[place], group[place])
        else:
            owner = model.get_submodule(place)
            found |= _within(place, owner, shapes[place], group, about)
    return found


def _owners(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The layers that run some of the layers called ``names`` in a call of their own."""
    found = {}
    for name in names:
        parent = name.rpartition(".")[0]
        if name:
            owner = model.get_submodule(parent)
            if isinstance(owner, FoldsNorms) and owner.is_whole:
                found[name] = parent
    return found


def _shapes_of_calls(
    model: nn.Module, example: Example, names: Iterable[str]
) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}

    def noting(name: str) -> Any:
        return lambda _, arguments: found[name].append(tuple(arguments[0].shape))

    handles = [model.get_submodule(n).register_forward_pre_hook(noting(n)) for n in found]
    try:
        output_of(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _seconds(layers: Sequence[nn.Module], shapes: _Shapes) -> list[float]:
    """Of a pass of each layer, over all calls."""
    weight = next(layers[0].parameters())
    total = [0.0] * len(layers)
    ready = [copy.deepcopy(layer).eval() for layer in layers]
    for shape in shapes:
        x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        total = [s + t for s, t in zip(total, measure_latency(ready, x), strict=True)]
    return total


def _alone(about: LayerFactors, candidate: Candidate) -> LayerFactors:
    before, after = _seconds([candidate.layer, candidate.pair], candidate.shapes)
    left = None
    if after >= before:
        left = f"the pair took {1e3 * after:.3f} ms, the layer {1e3 * before:.3f} ms"
    return replace(about, seconds=before, seconds_after=after, left=left)


def _within(
    place: str,
    owner: nn.Module,
    shapes: _Shapes,
    group: Mapping[str, Candidate],
    about: Mapping[str, LayerFactors],
) -> dict[str, LayerFactors]:
    """Members of one layer, in the fastest choice."""
    sizes = range(len(group) + 1)
    choices = [chosen for size in sizes for chosen in itertools.combinations(group, size)]
    made = []
    for chosen in choices:
        made.append(copy.deepcopy(owner))
        for name in chosen:
            replace_layer(made[-1], name.rpartition(".")[2], copy.deepcopy(group[name].pair))
    seconds = dict(zip(choices, _seconds(made, shapes), strict=True))
    # Of equals the one that is changed the least.
    best = min(choices, key=lambda chosen: seconds[chosen])
    found = {}
    for name, result in about.items():
        if name in best:
            found[name] = replace(result, seconds=seconds[()], seconds_after=seconds[best])
            continue
        after = min(taken for chosen, taken in seconds.items() if name in chosen)
        left = f"{place} took {1e3 * after:.3f} ms with the pair, {1e3 * seconds[best]:.3f} without"
        found[name] = replace(result, seconds=seconds[best], seconds_after=after, left=left)
    return found
