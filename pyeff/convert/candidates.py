"""Which layers of a network can be expanded, and why others cannot."""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from pyeff.compress.layer_calls import Example, layer_inputs
from pyeff.convert.replace import EXPANDED

Choice = Collection[str] | Callable[[str, nn.Module], bool]
Layer = nn.Conv2d | nn.Linear

_WILD = "*?["


class Candidate(NamedTuple):
    """One convolution or linear layer.

    Attributes:
        name: its first name.
        layer: the layer.
        left: why it stays as it is; ``None`` where it is to be expanded.
        asked: whether it was asked for by its own name, so that leaving it would be an error.
    """

    name: str
    layer: nn.Module
    left: str | None
    asked: bool


def candidates(
    op: str, model: nn.Module, layers: Choice | None, linear: bool, example: Example | None
) -> list[Candidate]:
    """Every ``nn.Conv2d`` and ``nn.Linear`` of a network, and whether it is to be expanded.

    Args:
        op: for messages.
        model: any network.
        layers: names, patterns, a predicate, or ``None``, as :func:`pyeff.convert.expand` takes
            them.
        linear: whether linear layers but the last are among those that are expanded by default.
        example: the input of a forward pass: layers that are not called are found on it.

    Raises:
        TypeError: ``layers`` of the wrong kind.
        ValueError: a name or a pattern that no layer has.
    """
    named = _layers_of(model)
    _check(op, named, layers)
    called: Mapping[str, object] | None = None
    if example is not None:
        called = layer_inputs(model, example, list(named))
    shared = _shared_weights(model)
    linears = [name for name, layer in named.items() if isinstance(layer, nn.Linear)]
    found = []
    for name, layer in named.items():
        asked = layers is not None and not callable(layers) and name in layers
        wanted = asked or (callable(layers) and bool(layers(name, layer)))
        left = None
        if not wanted:
            left = _not_chosen(name, layers) or _not_by_default(
                layer, linear, [name] == linears[-1:]
            )
        if wanted or left is None:
            left = _impossible(name, layer, called, shared)
        found.append(Candidate(name, layer, left, asked))
    return found


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by their first names, but for those within expanded ones."""
    inner = {
        id(member)
        for layer in model.modules()
        if isinstance(layer, EXPANDED)
        for member in layer.modules()
    }
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer) not in inner
    }


def _check(op: str, named: Mapping[str, nn.Module], layers: Choice | None) -> None:
    if layers is None or callable(layers):
        return
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise TypeError(
            f"{op}: layers must be several names or patterns, or a function, got {layers!r}"
        )
    unknown = sorted(entry for entry in layers if not any(_matches(name, entry) for name in named))
    if unknown:
        raise ValueError(
            f"{op}: layers must name convolutions or linear layers of the model, got {unknown}"
        )


def _matches(name: str, entry: str) -> bool:
    """Whether an entry is a layer's name, or a pattern for it."""
    return name == entry or (any(c in entry for c in _WILD) and fnmatchcase(name, entry))


def _not_chosen(name: str, layers: Choice | None) -> str | None:
    if layers is None or (not callable(layers) and any(_matches(name, entry) for entry in layers)):
        return None
    return "not among the layers that were asked for"


def _not_by_default(layer: nn.Module, linear: bool, last: bool) -> str | None:
    """Why a layer stays that was not asked for by itself."""
    if isinstance(layer, nn.Linear):
        if not linear:
            return "a linear layer: linear=True expands them"
        return "the last linear layer: ask for it by name" if last else None
    if isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1):
        return "a 1 x 1 convolution: ask for it by name"
    return None


def _impossible(
    name: str, layer: nn.Module, called: Mapping[str, object] | None, shared: set[int]
) -> str | None:
    """Why nothing can be put in a layer's place."""
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"a {type(layer).__name__} may compute something else than its base class"
    own = {key for key, tensor in layer._parameters.items() if tensor is not None}
    if own - {"weight", "bias"} or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a hook"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    if any((*hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return "it has hooks, which would be lost"
    if any(id(parameter) in shared for parameter in layer.parameters()):
        return "another module has the same weight or bias"
    if called is not None and name not in called:
        return "not called on the example: its parent reads its weights, or does not run it"
    return None


def _shared_weights(model: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, number in owners.items() if number > 1}
