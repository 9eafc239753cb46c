"""Compression: networks that learn their own size while they train."""

from pyeff.compress.channel_group import ChannelGroup, Member
from pyeff.compress.compressor import Compressed, Compressor
from pyeff.compress.factorize import factorize, factorize_with_report
from pyeff.compress.factorize_report import FactorizeReport, LayerFactors
from pyeff.compress.group_sparsity import GroupSparsity
from pyeff.compress.groups import ChannelMap, channel_groups, map_channels
from pyeff.compress.low_rank import LowRank
from pyeff.compress.ortho_reg import OrthoReg, repulsion
from pyeff.compress.parameter_count import ParameterCount
from pyeff.compress.plain import plain_module
from pyeff.compress.prox import (
    shrink_groups,
    shrink_groups_in_metric,
    shrink_singular_values,
    soft_threshold,
)
from pyeff.compress.rank_rules import RankRule
from pyeff.compress.saved import load, save
from pyeff.compress.shrink import shrink, shrink_with_report
from pyeff.compress.shrink_report import ShrinkReport
from pyeff.compress.zero_smallest import zero_smallest

__all__ = [
    "ChannelGroup",
    "ChannelMap",
    "Compressed",
    "Compressor",
    "FactorizeReport",
    "GroupSparsity",
    "LayerFactors",
    "LowRank",
    "Member",
    "OrthoReg",
    "ParameterCount",
    "RankRule",
    "ShrinkReport",
    "channel_groups",
    "factorize",
    "factorize_with_report",
    "load",
    "map_channels",
    "plain_module",
    "repulsion",
    "save",
    "shrink",
    "shrink_groups",
    "shrink_groups_in_metric",
    "shrink_singular_values",
    "shrink_with_report",
    "soft_threshold",
    "zero_smallest",
]
