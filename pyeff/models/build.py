"""From a configuration (as checkpoints hold it) to a model."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from pyeff.models.alexnet_small import alexnet_small
from pyeff.models.decomposeme import dec3, decomposeme
from pyeff.models.described import apply_description
from pyeff.models.dvn import dvn
from pyeff.models.erfnet import erfnet
from pyeff.models.hydranet_densenet import hydranet_densenet
from pyeff.models.hydranet_resnet import hydranet_resnet, hydranet_resnet50
from pyeff.models.hydranet_ressep import hydranet_ressep
from pyeff.models.mobilenet_v1 import mobilenet_v1
from pyeff.models.mobilenet_v2 import mobilenet_v2
from pyeff.models.nestednet import nestednet
from pyeff.models.resnet import ResNet, build_backbone, initialise
from pyeff.models.resnet50_decomposed import resnet50_decomposed
from pyeff.models.shufflenet_v2 import shufflenet_v2_x0_5
from pyeff.models.smallnet import smallnet
from pyeff.models.unet_small import unet_small
from pyeff.models.yolo_lite import yolo_lite


def compressed(base: Mapping[str, Any], layers: Mapping[str, Any]) -> nn.Module:
    """A network with the sizes that compression left it, with fresh weights.

    Args:
        base: the configuration of the network before it.
        layers: what differs, as :func:`pyeff.models.described.describe` tells it.

    Raises:
        ValueError: as :func:`build` and :func:`pyeff.models.described.apply_description`.
    """
    model = apply_description(build(base), layers)
    if isinstance(model, ResNet):
        initialise(model)
    cast(Any, model).config = {"family": "compressed", "base": dict(base), "layers": dict(layers)}
    return model


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "alexnet_small": alexnet_small,
    "backbone": build_backbone,
    "compressed": compressed,
    "dec3": dec3,
    "decomposeme": decomposeme,
    "dvn": dvn,
    "erfnet": erfnet,
    "hydranet_densenet": hydranet_densenet,
    "hydranet_resnet": hydranet_resnet,
    "hydranet_resnet50": hydranet_resnet50,
    "hydranet_ressep": hydranet_ressep,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "nestednet": nestednet,
    "resnet50_decomposed": resnet50_decomposed,
    "shufflenet_v2_x0_5": shufflenet_v2_x0_5,
    "smallnet": smallnet,
    "unet_small": unet_small,
    "yolo_lite": yolo_lite,
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
