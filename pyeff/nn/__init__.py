"""Layers: drop-in, stateful, thin; the arithmetic is in :mod:`pyeff.ops`."""

from pyeff.nn.batch_statistics import is_distributed, synchronised_batch_norm
from pyeff.nn.branch_batch_norm2d import BranchBatchNorm2d
from pyeff.nn.branch_conv2d import BranchConv2d
from pyeff.nn.branch_linear import BranchLinear
from pyeff.nn.branches import Branches
from pyeff.nn.combiner import Combiner
from pyeff.nn.nested_batch_norm2d import NestedBatchNorm2d
from pyeff.nn.nested_conv2d import NestedConv2d
from pyeff.nn.nested_linear import NestedLinear
from pyeff.nn.nested_masked import LevelMask, NestedMaskedConv2d, NestedMaskedLinear
from pyeff.nn.synchronise import SynchronisedBatchNorm2d, synchronise_batch_norm
from pyeff.nn.top_k_gate import GateOutput, TopKGate
from pyeff.nn.units import ChannelUnits, Range

__all__ = [
    "BranchBatchNorm2d",
    "BranchConv2d",
    "BranchLinear",
    "Branches",
    "ChannelUnits",
    "Combiner",
    "GateOutput",
    "LevelMask",
    "NestedBatchNorm2d",
    "NestedConv2d",
    "NestedLinear",
    "NestedMaskedConv2d",
    "NestedMaskedLinear",
    "Range",
    "SynchronisedBatchNorm2d",
    "TopKGate",
    "is_distributed",
    "synchronise_batch_norm",
    "synchronised_batch_norm",
]
