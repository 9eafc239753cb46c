"""Magnitude pruning of whole channels: the smallest ones are set to zero after the training."""

import copy
import math

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import ChannelGroup
from pyeff.compress.group_sparsity import GroupSparsity, default_floor
from pyeff.compress.groups import Example, channel_groups

_OP = "zero_smallest"


@torch.no_grad()
def zero_smallest(
    model: nn.Module,
    example: Example,
    *,
    share: float | None = None,
    target_params: float | None = None,
    include_norm: bool = False,
    floor: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Sets the smallest channels of all layers to zero, in place, for :func:`shrink` to remove.

    What a penalty during the training is compared with. The other channels keep their weights. A
    channel's length is that of its parameters in all layers that are tied
    (:func:`~pyeff.compress.channel_groups`). Exactly one of ``share`` and ``target_params`` says
    how many stay.

    Args:
        model: any network that ``channel_groups`` can trace; its weights are changed.
        example: its input, as for ``channel_groups``.
        share: of its channels that every group keeps, the longest, rounded up; in (0, 1].
        target_params: share of the network's parameters that removal shall leave, in (0, 1]. Which
            channels go is decided over all layers, as :class:`GroupSparsity` would: by their length
            over the mean length in their group; the first group's count 2.5 times.
        include_norm: whether scales and shifts of batch norms are set to zero too, so that nothing
            is left to fold.
        floor: channels that every group keeps; by default 8 or 5 %, whichever is more.

    Returns:
        For each group its channels, and how many of them are not zero now.

    Raises:
        ValueError: none or both given, out of range; a network without channels that can be
            removed; a target that the floors do not allow. The model is unchanged.
        ImportError: torch-pruning is missing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
        >>> zero_smallest(net, torch.randn(1, 3, 8, 8), share=0.5)
        {'0': (32, 16)}
    """
    given = {"share": share, "target_params": target_params}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(
            f"{_OP}: share or target_params must be given, got {' and '.join(chosen) or 'neither'}"
        )
    for name, value in given.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{_OP}: {name} must be in (0, 1], got {value}")
    if floor is not None and floor < 1:
        raise ValueError(f"{_OP}: floor must be at least 1, got {floor}")
    if share is not None:
        groups = channel_groups(model, example, include_norm=include_norm)
        dead = {group: _smallest(group, model, share, floor) for group in groups}
    else:
        # One application of the penalty to a copy, as strong as the size asks for.
        trial = copy.deepcopy(model)
        sparsity = GroupSparsity(
            trial,
            example,
            target_params=target_params,
            schedule=[1.0],
            include_norm=include_norm,
            floor=floor,
        )
        sparsity.attach(torch.optim.SGD(trial.parameters(), lr=1.0))
        sparsity.end_epoch(lr=1.0)
        dead = {group: group.dead(trial) for group in sparsity.groups}
    if not dead:
        raise ValueError(f"{_OP}: model must have channels that can be removed, got none")
    left = {}
    for group, gone in dead.items():
        group.clear(model, gone)
        left[group.name] = (group.channels, group.channels - int(gone.sum()))
    return left


def _smallest(group: ChannelGroup, model: nn.Module, share: float, floor: int | None) -> Tensor:
    """Which channels are not among the longest share of a group, bool ``[channels]``."""
    length = group.gather(model).double().norm(dim=1)
    # A share such as 0.3 of 10 shall be 3, although 0.3 * 10 is a hair more.
    kept = math.ceil(share * group.channels - 1e-9)
    kept = max(kept, default_floor(group.channels) if floor is None else floor)
    gone = torch.ones(group.channels, dtype=torch.bool)
    gone[length.argsort(descending=True, stable=True)[:kept].cpu()] = False
    return gone
