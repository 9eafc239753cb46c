"""Layers that are trained as several and run as one: what cannot be factored refuses them."""

from torch import nn

from pyeff.nn import ExpandedConv2d, ExpandedLinear, Reparam

_EXPANDED = (ExpandedConv2d, ExpandedLinear, Reparam)


def refuse_expanded(op: str, model: nn.Module) -> None:
    """Raises ValueError for a network whose layers are to be contracted before.

    The singular values of a member say nothing about those of the layer that the members become.
    """
    found = [name for name, layer in model.named_modules() if isinstance(layer, _EXPANDED)]
    if found:
        names = ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else "")
        raise ValueError(
            f"{op}: model must be contracted first (pyeff.convert.contract), got {len(found)} "
            f"expanded layers: {names}"
        )
