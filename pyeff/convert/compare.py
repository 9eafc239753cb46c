"""How far a network lies from one that should compute the same, as a whole and layer by layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyeff.compress.layer_calls import Example, arguments_of, output_of
from pyeff.compress.trial import as_precise, rounding
from pyeff.nn.folding import layers_apart


class Apart(NamedTuple):
    """The largest difference of two outputs.

    Attributes:
        absolute: of single numbers.
        relative: the same over the largest number of the wanted output.
    """

    absolute: float
    relative: float

    def or_more(self, other: "Apart") -> "Apart":
        """Of two the one that is relatively larger."""
        return other if other.relative > self.relative else self


class Comparison(NamedTuple):
    """What running two networks on the same input showed.

    Attributes:
        whole: of the networks' outputs.
        layers: of each layer's output on the input that the layer has in the larger network; by
            name. Layers that did not run as layers are missing.
        precision: the dtype that the networks ran in.
    """

    whole: Apart
    layers: dict[str, Apart]
    precision: str

    @property
    def worst(self) -> str | None:
        """The layer whose outputs lie farthest apart, relatively."""
        return max(self.layers, key=lambda name: self.layers[name].relative, default=None)


def check_example(op: str, model: nn.Module, example: Any) -> tuple[Tensor, ...]:
    """The arguments of a forward pass.

    Raises:
        TypeError: what is no tensor and no sequence of tensors.
        ValueError: what the model does not take.
    """
    if not isinstance(example, Tensor) and not (
        isinstance(example, Sequence) and all(isinstance(x, Tensor) for x in example)
    ):
        raise TypeError(
            f"{op}: example must be a tensor or a sequence of tensors, got {type(example).__name__}"
        )
    inputs = arguments_of(example)
    try:
        output_of(model, inputs)
    except Exception as error:
        # Whatever a network raises for an input that it does not take.
        raise ValueError(
            f"{op}: example must be an input that the model takes, got "
            f"{[list(x.shape) for x in inputs]} ({type(error).__name__}: {error})"
        ) from error
    return inputs


def default_tolerance(model: nn.Module, precision: str) -> float:
    """How far outputs may lie apart because weights were rounded to the network's precision.

    Args:
        model: the network.
        precision: in which it was run; in its own, sums of another order are rounded as well.
    """
    found = [rounding(p.dtype) for p in model.parameters() if p.is_floating_point()]
    limit = max(found, default=rounding(torch.float64))
    return limit if precision == "float64" else 10 * limit


def compare(
    members: nn.Module, one: nn.Module, inputs: Example, pairs: Mapping[str, str]
) -> Comparison:
    """Runs two networks in eval mode, layers that are several members by their members.

    In float64 where the networks can, with the weights that they have: what is measured is what
    the rounding of the weights and mistakes of the algebra make, not the order of sums.

    Args:
        members: what the outputs should be.
        one: the other network.
        inputs: of a forward pass.
        pairs: layers to compare by themselves: their names in ``members`` and in ``one``.
    """
    (precise_one, precise_members), given = as_precise([one, members], arguments_of(inputs))
    layers: dict[str, Apart] = {}
    handles = [
        precise_members.get_submodule(name).register_forward_hook(
            _compares(layers, name, precise_one.get_submodule(twin))
        )
        for name, twin in pairs.items()
    ]
    with layers_apart():
        wanted = output_of(precise_members, given)
        for handle in handles:
            handle.remove()
        found = output_of(precise_one, given)
    return Comparison(apart(found, wanted), layers, _precision(wanted))


def _compares(layers: dict[str, Apart], name: str, twin: nn.Module) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        other = apart(output_of(twin, inputs), [output])
        layers[name] = layers[name].or_more(other) if name in layers else other

    return hook


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Apart:
    """The largest difference of two outputs; infinite where a number is NaN.

    Raises:
        ValueError: another number of tensors, or other shapes.
    """
    shapes = [list(t.shape) for t in found], [list(t.shape) for t in wanted]
    if shapes[0] != shapes[1]:
        raise ValueError(f"convert: outputs must keep their shapes {shapes[1]}, got {shapes[0]}")
    absolute = size = 0.0
    for one, other in zip(found, wanted, strict=True):
        if other.numel():
            difference = (one.double() - other.double()).abs().max().nan_to_num(math.inf, math.inf)
            absolute = max(absolute, float(difference))
            size = max(size, float(other.double().abs().max()))
    return Apart(absolute, absolute / size if size else absolute)


def _precision(outputs: Sequence[Tensor]) -> str:
    return str(outputs[0].dtype).removeprefix("torch.")
