"""Other layers in the places of a network's own, in a copy of it."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from pyeff.compress.saved import carry_description
from pyeff.models import build
from pyeff.models.described import describe
from pyeff.nn import ExpandedConv2d, ExpandedLinear, Reparam

# Layers that are several in training and one at run time.
EXPANDED = (ExpandedConv2d, ExpandedLinear, Reparam)


def with_layers(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a network with other layers, wherever the network refers to the old ones.

    Args:
        model: is not changed; the copy shares no tensor with it.
        made: by the names of the layers that they replace; they become part of the copy.
    """
    # What deepcopy takes for the copy of an object that it has met already.
    memo: dict[int, Any] = {id(model.get_submodule(name)): layer for name, layer in made.items()}
    return copy.deepcopy(model, memo)


def expanded_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that contract, by their first names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, EXPANDED)}


def describe_anew(new: nn.Module, original: nn.Module, **changed: Any) -> None:
    """Notes in a network what it is made of, so that it can be saved; in place.

    A network of :mod:`pyeff.models` gets the ``config`` that rebuilds it. Of others
    :func:`pyeff.compress.save` takes a description.

    Args:
        new: the network.
        original: the one that it was made of.
        changed: arguments of an expandable family that are not those of the original any more.
    """
    config = getattr(original, "config", None)
    if not (isinstance(config, dict) and "family" in config):
        carry_description(new, original)
        return
    base = config["base"] if config["family"] == "compressed" else config
    if base.get("expand") is not None:
        base = {**base, **changed}
    with torch.device("meta"):
        built = build(base)
    layers = describe(new, built)
    base = copy.deepcopy(base)
    described = {"family": "compressed", "base": base, "layers": layers} if layers else base
    cast(Any, new).config = described


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
