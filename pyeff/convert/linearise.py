"""From the non-linear expanded network to the linear one: the start that the paper calls +Init."""

import copy

from torch import nn

from pyeff.convert.replace import describe_anew
from pyeff.nn import ExpandedConv2d, ExpandedLinear

_OP = "linearise"


def linearise(model: nn.Module) -> nn.Module:
    """The network with the same weights and no activation within its expanded layers.

    What the paper calls "+Init": a network with an activation after each inner member is trained,
    its weights start the linear network, and that one is trained and contracted. It computes
    something else than the network that it was made of.

    Args:
        model: with expanded layers that have an ``activation``; it is not changed.

    Returns:
        A new network in the mode of the given one, whose expanded layers contract.

    Raises:
        TypeError: no ``nn.Module``.
        ValueError: no layer has an activation.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020.

    Example:
        >>> trained = nn.Sequential(ExpandedConv2d(3, 8, 5, activation="relu"), nn.ReLU())
        >>> linearise(trained)[0].contract()
        Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    linear = copy.deepcopy(model)
    found = [
        layer
        for layer in linear.modules()
        if isinstance(layer, ExpandedConv2d | ExpandedLinear) and layer.activation is not None
    ]
    if not found:
        raise ValueError(
            f"{_OP}: model must have expanded layers with an activation, got none in "
            f"{type(model).__name__}"
        )
    for layer in found:
        layer.activation = None
    describe_anew(linear, model, activation=None)
    return linear
