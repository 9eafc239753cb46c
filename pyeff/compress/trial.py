"""Removes channels on trial: outputs are compared before a removal is believed."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import ChannelGroup
from pyeff.compress.constants import Carried, Inputs, meets_border, norms_after, readers, take_over
from pyeff.compress.cut_layers import cut_layers, cuts_of
from pyeff.compress.layer_calls import output_of

Gone = dict[ChannelGroup, Tensor]  # bool [channels]: which are removed


class Trial:
    """Removes channels from a network and compares; what cannot be removed is found by halves."""

    def __init__(
        self,
        whole: nn.Module,
        inputs: Sequence[Inputs],
        carried: Mapping[str, Carried],
        tolerance: float,
    ) -> None:
        self.whole, self.inputs, self.carried = whole, inputs, carried
        self.tolerance = tolerance
        self.norms: dict[str, str] | None = None

    def largest(self, gone: Gone, kept: Mapping[str, Counter[str]]) -> Gone:
        """The groups that can be removed together; ``kept`` gets the reasons of the others."""
        accepted: Gone = {}
        parts = [{group: chosen for group, chosen in gone.items() if chosen.any()}]
        while parts:
            part = parts.pop()
            reason = self._fails({**accepted, **part})
            if not reason:
                accepted |= part
            elif len(part) == 1:
                for group, chosen in part.items():
                    kept[group.name][reason] += int(chosen.sum())
            else:
                items = list(part.items())
                middle = len(items) // 2
                parts += [dict(items[middle:]), dict(items[:middle])]
        return accepted

    def _fails(self, gone: Gone) -> str:
        if not gone:
            return ""
        try:
            difference = self.run(gone)[3]
        except Exception as error:
            # A network that holds its sizes outside of its layers raises anything.
            return f"without them: {type(error).__name__}: {error}"
        if difference > self.tolerance:
            return f"without them the outputs differ by {difference:.1e}"
        return ""

    @torch.no_grad()
    def run(self, gone: Gone) -> tuple[nn.Module, dict[str, Tensor], bool, float]:
        """The network without the channels, its sources, whether borders differ, and how much."""
        folded = copy.deepcopy(self.whole)
        borders = self._fold(folded, gone)
        made = copy.deepcopy(folded)
        sources = cut_layers(made, cuts_of(made, gone.items()))
        (small, full), _ = as_precise([made, folded], self.inputs[0])
        difference = self._apart(small, full)
        if not borders:
            (before, _), _ = as_precise([self.whole, folded], self.inputs[0])
            shift = self._apart(full, before)
            # The new biases are rounded to the network's own precision.
            if shift > max(self.tolerance, rounding(next(folded.parameters()).dtype)):
                raise ValueError(f"their constants as biases change the outputs by {shift:.1e}")
        return made, sources, borders, difference

    def _apart(self, one: nn.Module, other: nn.Module) -> float:
        dtype = next(other.parameters()).dtype
        given = [tuple(cast_to(x, dtype) for x in example) for example in self.inputs]
        return max(largest_difference(output_of(one, x), output_of(other, x)) for x in given)

    def _fold(self, model: nn.Module, gone: Gone) -> bool:
        """Moves constants into readers, in place; whether one met zero padding."""
        lost: dict[str, list[int]] = {}
        for group, chosen in gone.items():
            for member in readers(model, group):
                positions = member.index[chosen].flatten().tolist()
                lost.setdefault(member.name, []).extend(positions)
        borders = False
        for name, channels in lost.items():
            if not channels:
                continue
            values = self.carried[name].value[channels]
            if values.any():
                borders |= meets_border(model.get_submodule(name))
                self.norms = self.norms or norms_after(self.whole, self._native(), sorted(lost))
            take_over(model, name, channels, values, (self.norms or {}).get(name))
        return borders

    def _native(self) -> Inputs:
        dtype = next(self.whole.parameters()).dtype
        return tuple(cast_to(x, dtype) for x in self.inputs[0])


def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input in a precision; whole numbers stay what they are."""
    return x.to(dtype) if x.is_floating_point() else x


def as_precise(
    models: Sequence[nn.Module], inputs: Inputs
) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Copies of networks in float64, and inputs for them; as they are where one cannot run so."""
    precise = [copy.deepcopy(model).double() for model in models]
    given = tuple(cast_to(x, torch.float64) for x in inputs)
    try:
        output_of(precise[-1], given)
    except (RuntimeError, TypeError, ValueError):
        # A network may make tensors of a fixed precision within.
        return list(models), inputs
    return precise, given


def largest_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, over the largest number of the second.

    Raises:
        ValueError: other shapes.
    """
    shapes = [list(t.shape) for t in found], [list(t.shape) for t in wanted]
    if shapes[0] != shapes[1]:
        raise ValueError(f"shrink: outputs must keep their shapes {shapes[1]}, got {shapes[0]}")
    apart = size = 0.0
    for one, other in zip(found, wanted, strict=True):
        if other.numel() == 0:
            continue
        apart = max(apart, float((one.double() - other.double()).abs().max().nan_to_num(math.inf)))
        size = max(size, float(other.double().abs().max()))
    return apart / size if size else apart


def rounding(dtype: torch.dtype) -> float:
    """How far sums of another order may lie apart."""
    return 100 * torch.finfo(dtype).eps
