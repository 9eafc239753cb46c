"""Compression: networks that learn their own size while they train."""

from pyeff.compress.channel_group import ChannelGroup, Member
from pyeff.compress.group_sparsity import GroupSparsity
from pyeff.compress.groups import ChannelMap, channel_groups, map_channels
from pyeff.compress.low_rank import LowRank
from pyeff.compress.ortho_reg import OrthoReg, repulsion
from pyeff.compress.parameter_count import ParameterCount
from pyeff.compress.prox import (
    shrink_groups,
    shrink_groups_in_metric,
    shrink_singular_values,
    soft_threshold,
)

__all__ = [
    "ChannelGroup",
    "ChannelMap",
    "GroupSparsity",
    "LowRank",
    "Member",
    "OrthoReg",
    "ParameterCount",
    "channel_groups",
    "map_channels",
    "repulsion",
    "shrink_groups",
    "shrink_groups_in_metric",
    "shrink_singular_values",
    "soft_threshold",
]
