"""One round of removal: which channels are dead, what they leave, and the network without them."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import (
    CONSUMER,
    NORM,
    PRODUCER,
    SCALE,
    ChannelGroup,
    Member,
)
from pyeff.compress.constants import (
    Carried,
    Inputs,
    carried_by,
    has_phases,
    meets_border,
    readers,
)
from pyeff.compress.cut_layers import cuts_of, filters_of, scale_axis, zero_filters
from pyeff.compress.trial import Gone, Trial, as_precise, cast_to, rounding

_PROBES = 3  # random inputs beside the example
_EXACT = 1e-9  # relative; what rounding in float64 stays below in any network


class Options(NamedTuple):
    """The user's choices, as :func:`pyeff.compress.shrink` names them."""

    threshold: float
    constants: str
    round_to: int


@dataclass(frozen=True)
class Removal:
    """What one round gave.

    Attributes:
        model: the network without the channels.
        sources: where the numbers of its cut tensors were; empty where nothing was removed.
        kept: for each group, why dead channels stayed, with their number.
        borders: whether a constant met zero padding.
        difference: between the outputs with the dead channels unread and without them.
        tolerance: what that was held to.
    """

    model: nn.Module
    sources: dict[str, Tensor]
    kept: dict[str, dict[str, int]]
    borders: bool
    difference: float
    tolerance: float


def remove_dead(
    model: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup], options: Options
) -> Removal:
    """Removes what is dead once.

    Args:
        model: the network; not changed.
        inputs: of one pass.
        groups: its tied channels.
        options: the user's choices.

    Raises:
        ValueError: a layer would lose all its channels.
    """
    whole = copy.deepcopy(model)
    candidates = _candidates(whole, groups, options.threshold)
    kept: dict[str, Counter[str]] = {}
    (probed,), _ = as_precise([whole], inputs)
    dtype = next(probed.parameters()).dtype
    tolerance = _EXACT if dtype == torch.float64 else rounding(dtype)
    if not candidates:
        return Removal(whole, {}, {}, False, 0.0, tolerance)
    given = [tuple(cast_to(x, dtype) for x in probe) for probe in _probes(inputs)]
    carried = _carried(probed, given, candidates)
    gone: Gone = {}
    for group, dead in candidates.items():
        gone[group], kept[group.name] = _removable(
            model, group, dead, carried, options.constants == "keep"
        )
    _check_survivors(model, gone)
    for group, chosen in gone.items():
        spared = _spared(model, group, chosen, carried, options.round_to)
        if spared.any():
            kept[group.name][f"rounded up to {options.round_to}"] += int(spared.sum())
        gone[group] = chosen & ~spared
    trial = Trial(whole, given, carried, tolerance, dtype == torch.float64)
    made = trial.largest(gone, kept)
    named = {name: dict(why) for name, why in kept.items() if why}
    return Removal(made.model, made.sources, named, made.borders, made.difference, tolerance)


@torch.no_grad()
def _candidates(model: nn.Module, groups: Sequence[ChannelGroup], threshold: float) -> Gone:
    """Channels that some layer makes of zeros, by its filter, its norm or its scale.

    Filters below the threshold are set to zero in ``model``.
    """
    found: Gone = {}
    for group in groups:
        dead = torch.zeros(group.channels, dtype=torch.bool)
        for member in group.members:
            if member.role == CONSUMER:
                continue
            zeros = _zero_outputs(model, member, threshold)
            if zeros is not None:
                dead |= zeros[member.index].all(1)
                if member.role == PRODUCER and threshold > 0:
                    zero_filters(model.get_submodule(member.name), zeros)
        if dead.any():
            found[group] = dead
    return found


def _zero_outputs(model: nn.Module, member: Member, threshold: float) -> Tensor | None:
    """Which channels of a layer or a parameter are nothing but zeros; None where none can be."""
    if member.role == PRODUCER:
        return (filters_of(model.get_submodule(member.name)).abs() <= threshold).all(1).cpu()
    if member.role == NORM:
        weight = model.get_submodule(member.name)._parameters.get("weight")
        return None if weight is None else (weight.detach() == 0).cpu()
    scale = dict(model.named_parameters()).get(member.name)
    if member.role != SCALE or scale is None:
        return None
    return (scale.detach().movedim(scale_axis(scale), 0).flatten() == 0).cpu()


def _carried(model: nn.Module, inputs: Sequence[Inputs], candidates: Gone) -> dict[str, Carried]:
    """What the readers of candidates are given while all live layers beside these are disturbed."""
    disturbed: dict[str, set[int]] = {}
    followed: set[str] = set()
    for group, dead in candidates.items():
        followed.update(member.name for member in readers(model, group))
        for member in group.members:
            layer = model.get_submodule(member.name) if member.role == PRODUCER else None
            # What a grouped convolution makes is made of the group's own channels.
            if layer is None or getattr(layer, "groups", 1) > 1:
                continue
            alive = ~(filters_of(layer) == 0).all(1).cpu()
            positions = member.index[dead].flatten()
            disturbed.setdefault(member.name, set()).update(positions[alive[positions]].tolist())
    noisy = {n: torch.tensor(sorted(at)) for n, at in disturbed.items() if at}
    return carried_by(model, inputs, sorted(followed), noisy)


def _removable(
    model: nn.Module, group: ChannelGroup, dead: Tensor, carried: Mapping[str, Carried], keep: bool
) -> tuple[Tensor, Counter[str]]:
    """Which dead channels give nothing but constants that their readers can take over."""
    gone, why = dead.clone(), Counter[str]()

    def spare(channels: Tensor, reason: str) -> None:
        number = int((gone & channels).sum())
        if number:
            why[reason] += number
        gone[channels] = False

    for member in readers(model, group):
        layer, seen = model.get_submodule(member.name), carried.get(member.name)
        if seen is None:
            spare(dead, f"{member.name} reads them but was not run")
            continue
        spare(seen.moves[member.index].any(1), f"{member.name} sees live values in them")
        spare(seen.uneven[member.index].any(1), f"{member.name} sees uneven maps in them")
        filled = (seen.value[member.index] != 0).any(1)
        if has_phases(layer):
            spare(filled, f"their constant has no bias that stands for it in {member.name}")
        if keep and meets_border(layer):
            spare(filled, f"their constant meets the borders of {member.name}")
    return gone, why


def _check_survivors(model: nn.Module, gone: Gone) -> None:
    """Raises where a layer would be left without a channel."""
    for name, cut in cuts_of(model, gone.items()).items():
        if cut.is_parameter:
            continue
        layer = model.get_submodule(name)
        sizes = {"out": cut.outputs, "in": cut.inputs}
        for side, lost in sizes.items():
            for kind in ("channels", "features"):
                size = getattr(layer, f"{side}_{kind}", None)
                if size is not None and lost and len(lost) >= size:
                    raise ValueError(
                        f"shrink: every layer must keep a channel, got {name} with all {size} of "
                        f"its {'outputs' if side == 'out' else 'inputs'} dead"
                    )


def _spared(
    model: nn.Module,
    group: ChannelGroup,
    gone: Tensor,
    carried: Mapping[str, Carried],
    multiple: int,
) -> Tensor:
    """Dead channels that stay so that the number of channels is a multiple, or is what it was."""
    spared = torch.zeros_like(gone)
    width = next(m.index.shape[1] for m in group.members if m.role == PRODUCER)
    step = multiple // math.gcd(width, multiple)
    left = int((~gone).sum())
    number = min(-(-left // step) * step, group.channels) - left
    if number > 0:
        # Those that would change the most at borders.
        size = torch.zeros(group.channels, dtype=torch.float64)
        for member in readers(model, group):
            if member.name in carried:
                size += carried[member.name].value[member.index].abs().sum(1)
        size[~gone] = -1
        spared[size.argsort(descending=True, stable=True)[:number]] = True
    return spared


def _probes(inputs: Inputs) -> list[Inputs]:
    """The example, and random inputs of its size."""
    random = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device)
        return (noise * (x.double().std(correction=0) + 1) + x.double().mean()).to(x.dtype)

    return [inputs, *(tuple(like(x) for x in inputs) for _ in range(_PROBES))]
