"""From a configuration (as checkpoints hold it) to a model."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyeff.models.decomposeme import dec3, decomposeme
from pyeff.models.dvn import dvn
from pyeff.models.erfnet import erfnet
from pyeff.models.hydranet_densenet import hydranet_densenet
from pyeff.models.hydranet_resnet import hydranet_resnet, hydranet_resnet50
from pyeff.models.hydranet_ressep import hydranet_ressep
from pyeff.models.nestednet import nestednet
from pyeff.models.resnet import build_backbone
from pyeff.models.resnet50_decomposed import resnet50_decomposed

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "backbone": build_backbone,
    "dec3": dec3,
    "decomposeme": decomposeme,
    "dvn": dvn,
    "erfnet": erfnet,
    "hydranet_densenet": hydranet_densenet,
    "hydranet_resnet": hydranet_resnet,
    "hydranet_resnet50": hydranet_resnet50,
    "hydranet_ressep": hydranet_ressep,
    "nestednet": nestednet,
    "resnet50_decomposed": resnet50_decomposed,
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """Builds the model that a ``model.config`` describes, with fresh weights.

    Args:
        config: ``{"family": ..., **keyword arguments of the family's function}``.

    Raises:
        ValueError: an unknown family, or arguments that it does not take.
    """
    arguments = dict(config)
    family = arguments.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"build: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    try:
        return FAMILIES[family](**arguments)
    except TypeError as error:
        raise ValueError(
            f"build: config must hold the arguments of {family}, got {sorted(arguments)} ({error})"
        ) from error
