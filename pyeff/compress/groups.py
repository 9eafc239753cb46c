"""Channels that live or die together: what a network's wiring ties, as groups of parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyeff.compress._flow_check import wrong_groups
from pyeff.compress._ties import find_ties
from pyeff.compress.channel_group import NORM, PRODUCER, ChannelGroup, Member, Rows

Example = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ChannelMap:
    """What :func:`map_channels` found.

    Attributes:
        groups: every group of channels that can be removed, in the order of the modules.
        left_out: for each layer of which output channels are in no group, why.
    """

    groups: tuple[ChannelGroup, ...]
    left_out: dict[str, str]


def channel_groups(
    model: nn.Module, example: Example, *, include_norm: bool = False
) -> list[ChannelGroup]:
    """The groups of output channels that can be removed, in the order of the modules.

    Channels that reach the network's outputs, that are tied to its inputs, or that a norm over
    channels mixes are in no group; :func:`map_channels` tells which and why.

    Args:
        model: any network whose forward pass autograd can record; it is not changed.
        example: its input, or several; a small image of one is enough. Shapes matter only where
            the network itself fixes them.
        include_norm: whether a group also has its norms' scales and shifts.

    Returns:
        The groups; none where nothing can be removed.

    Raises:
        TypeError: ``example`` is neither a tensor nor a sequence of them.
        ValueError: the network cannot be traced with the example.
        ImportError: torch-pruning is missing.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, through
    torch-pruning.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(group.name, group.channels) for group in channel_groups(net, torch.randn(1, 3, 8, 8))]
        [('0', 8)]
    """
    return list(map_channels(model, example, include_norm=include_norm).groups)


def map_channels(model: nn.Module, example: Example, *, include_norm: bool = False) -> ChannelMap:
    """:func:`channel_groups`, and why some layers are in no group.

    The ties are torch-pruning's. They are put to the test before they are believed: some channels
    of every group are disturbed, and no other than those may differ where the next layers read
    them.

    Args:
        model, example, include_norm: as there.

    Raises:
        TypeError, ValueError, ImportError: as there.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, Sequence) or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            "channel_groups: example must be a tensor or a sequence of tensors, got "
            f"{type(example).__name__}"
        )
    inputs = tuple(inputs)
    ties = find_ties(model, inputs)
    drafts = [_group(model, members, include_norm) for members in ties.groups]
    wrong = wrong_groups(model, inputs, drafts)
    left_out = dict(ties.left_out)
    for draft in drafts:
        for name in draft.producers if draft in wrong else ():
            left_out.setdefault(name, wrong[draft])
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    kept = [draft for draft in drafts if draft not in wrong]
    kept.sort(key=lambda group: (order[group.producers[0]], _first_channel(group)))
    return ChannelMap(_with_numbers(kept), left_out)


def _with_numbers(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Groups whose names differ."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        named.append(replace(group, name=name))
    return tuple(named)


def _first_channel(group: ChannelGroup) -> int:
    return next(int(m.index[0, 0]) for m in group.members if m.role == PRODUCER)


def _group(model: nn.Module, members: Sequence[Member], include_norm: bool) -> ChannelGroup:
    rows = []
    for member in members:
        if member.role == PRODUCER or (member.role == NORM and include_norm):
            rows += _rows_of(model.get_submodule(member.name), member)
    first = next(member for member in members if member.role == PRODUCER)
    return ChannelGroup(first.name, first.index.shape[0], tuple(members), tuple(rows), include_norm)


def _rows_of(module: nn.Module, member: Member) -> list[Rows]:
    """Weight and bias of a layer, as far as it has them."""
    prefix = f"{member.name}." if member.name else ""
    split = 0  # groups of a transposed convolution
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        split = module.groups
    found = []
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        groups = split if name == "weight" else 0
        outputs = tensor.shape[1] * groups if groups else tensor.shape[0]
        size = math.prod(tensor.shape) // outputs
        found.append(Rows(prefix + name, member.index, groups, size))
    return found
