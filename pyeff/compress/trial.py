"""Removes channels on trial: outputs are compared before a removal is believed."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import ChannelGroup
from pyeff.compress.constants import Carried, Inputs, meets_border, norms_after, readers, take_over
from pyeff.compress.cut_layers import cut_layers, cuts_of
from pyeff.compress.layer_calls import output_of

Gone = dict[ChannelGroup, Tensor]  # bool [channels]: which are removed


class Removed(NamedTuple):
    """A network without some channels.

    Attributes:
        model: the network.
        sources: as :func:`~pyeff.compress.cut_layers.cut_layers` gives them.
        borders: whether a folded constant met zero padding.
        difference: of its outputs from those with the channels there and unread, relative.
    """

    model: nn.Module
    sources: dict[str, Tensor]
    borders: bool
    difference: float


class Trial:
    """Removes channels from a network and compares; what cannot be removed is found by halves.

    Args:
        whole: the network; not changed.
        inputs: of several passes, in the precision to compare in.
        carried: what the readers of removable channels are given.
        tolerance: how far the outputs may lie apart, relative.
        precise: whether float64 is that precision; the network's own is otherwise.
    """

    def __init__(
        self,
        whole: nn.Module,
        inputs: Sequence[Inputs],
        carried: Mapping[str, Carried],
        tolerance: float,
        precise: bool,
    ) -> None:
        self.whole, self.inputs, self.carried = whole, inputs, carried
        self.tolerance, self.precise = tolerance, precise
        self.before = self._outputs(copy.deepcopy(whole))
        self.norms: dict[str, str] | None = None

    def largest(self, gone: Gone, kept: Mapping[str, Counter[str]]) -> Removed:
        """Removes the groups that can be removed together.

        Args:
            gone: channels to remove.
            kept: gets the reasons of the groups that stay.
        """
        accepted: Gone = {}
        made = Removed(copy.deepcopy(self.whole), {}, False, 0.0)
        parts = [{group: chosen for group, chosen in gone.items() if chosen.any()}]
        while parts:
            part = parts.pop()
            if not part:
                continue
            try:
                made = self.remove({**accepted, **part})
            except Exception as error:
                # A network that holds its sizes outside of its layers raises anything.
                reason = f"without them: {type(error).__name__}: {error}"
            else:
                accepted |= part
                continue
            if len(part) > 1:
                items, middle = list(part.items()), len(part) // 2
                parts += [dict(items[middle:]), dict(items[:middle])]
            for group, chosen in part.items() if len(part) == 1 else ():
                kept[group.name][reason] += int(chosen.sum())
        return made

    @torch.no_grad()
    def remove(self, gone: Gone) -> Removed:
        """The network without the channels.

        Raises:
            ValueError: its outputs are not what they were, but for borders.
        """
        full = copy.deepcopy(self.whole)
        borders = self._fold(full, gone)
        made = copy.deepcopy(full)
        sources = cut_layers(made, cuts_of(made, gone.items()))
        outputs = self._outputs(full)
        difference = _apart(self._outputs(copy.deepcopy(made)), outputs)
        if difference > self.tolerance:
            raise ValueError(f"the outputs differ by {difference:.1e}")
        if not borders:
            shift = _apart(outputs, self.before)
            # The new biases are rounded to the network's own precision.
            if shift > max(self.tolerance, rounding(next(self.whole.parameters()).dtype)):
                raise ValueError(f"their constants as biases change the outputs by {shift:.1e}")
        return Removed(made, sources, borders, difference)

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        """What a network, whose precision may be changed, gives for all inputs."""
        if self.precise:
            model.double()
        return [output_of(model, x) for x in self.inputs]

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


def _apart(found: Sequence[list[Tensor]], wanted: Sequence[list[Tensor]]) -> float:
    return max(largest_difference(a, b) for a, b in zip(found, wanted, strict=True))


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
