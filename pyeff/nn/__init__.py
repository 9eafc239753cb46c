"""Layers: drop-in, stateful, thin; the arithmetic is in :mod:`pyeff.ops`."""

from pyeff.nn.batch_statistics import is_distributed, synchronised_batch_norm
from pyeff.nn.branch_batch_norm2d import BranchBatchNorm2d
from pyeff.nn.branch_conv2d import BranchConv2d
from pyeff.nn.branch_linear import BranchLinear
from pyeff.nn.branches import Branches
from pyeff.nn.combiner import Combiner
from pyeff.nn.contraction import Kernel, compose, compose_all, compose_linear
from pyeff.nn.conv_norm2d import ConvNorm2d
from pyeff.nn.downsampler import Downsampler
from pyeff.nn.expanded_conv2d import ExpandedConv2d
from pyeff.nn.expanded_linear import ExpandedLinear
from pyeff.nn.factorized_conv2d import FactorizedConv2d
from pyeff.nn.nested_batch_norm2d import NestedBatchNorm2d
from pyeff.nn.nested_conv2d import NestedConv2d
from pyeff.nn.nested_linear import NestedLinear
from pyeff.nn.nested_masked import LevelMask, NestedMaskedConv2d, NestedMaskedLinear
from pyeff.nn.non_bottleneck_1d import NonBottleneck1d
from pyeff.nn.reparam import Reparam
from pyeff.nn.reparam_blocks import ACBlock, DiverseBranchBlock, RepVGGBlock
from pyeff.nn.synchronise import SynchronisedBatchNorm2d, synchronise_batch_norm
from pyeff.nn.top_k_gate import GateOutput, TopKGate
from pyeff.nn.units import ChannelUnits, Range
from pyeff.nn.upsampler import Upsampler

__all__ = [
    "ACBlock",
    "BranchBatchNorm2d",
    "BranchConv2d",
    "BranchLinear",
    "Branches",
    "ChannelUnits",
    "Combiner",
    "ConvNorm2d",
    "DiverseBranchBlock",
    "Downsampler",
    "ExpandedConv2d",
    "ExpandedLinear",
    "FactorizedConv2d",
    "GateOutput",
    "Kernel",
    "LevelMask",
    "NestedBatchNorm2d",
    "NestedConv2d",
    "NestedLinear",
    "NestedMaskedConv2d",
    "NestedMaskedLinear",
    "NonBottleneck1d",
    "Range",
    "RepVGGBlock",
    "Reparam",
    "SynchronisedBatchNorm2d",
    "TopKGate",
    "Upsampler",
    "compose",
    "compose_all",
    "compose_linear",
    "is_distributed",
    "synchronise_batch_norm",
    "synchronised_batch_norm",
]
