"""With which inputs a network calls its layers, seen on an example."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Example = Tensor | Sequence[Tensor]


def arguments_of(example: Example) -> tuple[Tensor, ...]:
    """The positional arguments of a forward pass: a tensor alone, or several.

    Raises:
        TypeError: something else, keyword arguments for one.
    """
    found = (example,) if isinstance(example, Tensor) else tuple(example)
    for argument in found:
        if not isinstance(argument, Tensor):
            raise TypeError(
                "compress: example must be a tensor or several, the forward pass's positional "
                f"arguments, got {type(example).__name__} of {type(argument).__name__}"
            )
    return found


def output_of(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors that a network puts out for an example, in eval mode; its mode is kept.

    Raises:
        ValueError: there is none.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            out = model(*arguments_of(example))
    finally:
        for module, training in modes:
            module.training = training
    found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if not found:
        raise ValueError(
            f"compress: model must put out a tensor, got {type(out).__name__} without one"
        )
    return found


def relative_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """``|found - wanted|_F / |wanted|_F`` over all tensors of an output.

    Raises:
        ValueError: another number of tensors, or other shapes.
    """
    shapes = [list(t.shape) for t in found], [list(t.shape) for t in wanted]
    if shapes[0] != shapes[1]:
        raise ValueError(f"compress: outputs must keep their shapes {shapes[1]}, got {shapes[0]}")
    pairs = list(zip(found, wanted, strict=True))
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return (apart / size) ** 0.5 if size else apart**0.5


def layer_inputs(
    model: nn.Module, example: Example, names: Sequence[str]
) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of the inputs with which layers are called, in running order.

    A layer that is missing was not called as a layer: its parent reads its weights by itself, or
    does not run it, and nothing can be put in its place.

    Args:
        model: left as it is.
        example: the arguments of a forward pass.
        names: layers to follow.

    Raises:
        Exception: whatever the model raises for an example that it does not take.
    """
    # First as it is, so that what is raised below comes from what was put in.
    output_of(model, example)
    try:
        return _inputs_of_stand_ins(model, example, names)
    except Exception:
        # Whatever a parent raises that asks a stand-in for a weight.
        fit = [name for name in names if _can_stand_in(model, example, name)]
        return _inputs_of_stand_ins(model, example, fit)


class _StandIn(nn.Sequential):
    """A layer behind something that has no weight, and notes the shapes of its inputs.

    Not a hook: some of PyTorch's layers read weights only where nothing has hooks.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.shapes: list[tuple[int, ...]] = []
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layer."""
        self.shapes.append(tuple(x.shape))
        result: Tensor = super().forward(x)
        return result


def _can_stand_in(model: nn.Module, example: Example, name: str) -> bool:
    try:
        _inputs_of_stand_ins(model, example, [name])
    except Exception:
        return False
    return True


def _inputs_of_stand_ins(
    model: nn.Module, example: Example, names: Sequence[str]
) -> dict[str, list[tuple[int, ...]]]:
    """Runs the network with something without weights in the place of each layer."""
    network = nn.ModuleDict({"network": copy.deepcopy(model)})
    layers = {id(network["network"].get_submodule(name)): name for name in names}
    made: dict[int, _StandIn] = {}
    for alias, layer in list(network.named_modules(remove_duplicate=False)):
        if id(layer) in layers:
            if id(layer) not in made:
                made[id(layer)] = _StandIn(layer)
            parent, _, own = alias.rpartition(".")
            network.get_submodule(parent)._modules[own] = made[id(layer)]
    output_of(network["network"], example)
    return {layers[key]: stand_in.shapes for key, stand_in in made.items() if stand_in.shapes}
