"""Which form of an expanded layer is faster to train: the one place that decides.

The chain costs multiply-adds at every pixel, the contracted form a composition of the weights once
a step and then the multiply-adds of the compact layer. So the chain can only win on few pixels. The
rates are those that ``benchmarks/ops/bench_expanded_conv2d.py`` measured on the processor which
``pyeff/ops/tables/cpu.json`` names.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.nn.contraction import Kernel, composition_macs
from pyeff.nn.expansion_plan import Edges
from pyeff.ops._dispatch import measured_rates

OP = "expanded_conv2d"


def linear_trains_faster_contracted(features: Sequence[int], rows: int, x: Tensor) -> bool:
    """As :func:`trains_faster_contracted`, for a chain of linear layers.

    Args:
        features: of the input, between the members and of the output.
        rows: vectors of the input.
        x: gives device and dtype.
    """
    if x.device.type != "cpu":
        return True
    rates = measured_rates(OP, x)
    pairs = list(pairwise(features))
    expanded = sum(rates["linear_s"] + rows * a * b / rates["linear_mac_per_s"] for a, b in pairs)
    inputs, first, second, outputs = features
    smaller = min(inputs, outputs)
    composition = first * second * smaller + inputs * outputs * (
        second if inputs == smaller else first
    )
    macs = composition + rows * inputs * outputs
    return 3 * rates["linear_s"] + macs / rates["linear_mac_per_s"] <= expanded


class FormCosts(NamedTuple):
    """Seconds of a training step, forward and backward, as the rates give them."""

    expanded: float
    contracted: float


class _Member(NamedTuple):
    shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]


def form_costs(kernels: Sequence[Kernel], x: Tensor, edges: Edges) -> FormCosts:
    """What both forms of a chain cost for an input on the CPU.

    Args:
        kernels: the members.
        x: ``[N, C, H, W]`` or ``[C, H, W]``.
        edges: padding of x.
    """
    members = tuple(_Member(k.shape, k.stride, k.dilation) for k in kernels)
    left, right, top, bottom = edges
    size = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    batch = x.shape[0] if x.ndim == 4 else 1
    return _form_costs(members, composition_macs(kernels), batch, size, x.dtype)


@lru_cache(maxsize=4096)
def _form_costs(
    members: tuple[_Member, ...],
    composition: int,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> FormCosts:
    rates = measured_rates(OP, torch.empty(0, dtype=dtype))
    expanded, taps = 0.0, [1, 1]
    for member in members:
        size = _output_size(member, size)
        macs = batch * prod(size) * prod(member.shape)
        values = batch * prod(size) * member.shape[0]
        expanded += rates["conv_s"] + macs / rates["conv_mac_per_s"]
        expanded += values / rates["values_per_s"]
        taps = [t + k - 1 for t, k in zip(taps, member.shape[2:], strict=True)]
    outputs, inputs = members[-1].shape[0], members[0].shape[1]
    pixels = batch * prod(size)
    contracted = rates["conv_s"] + pixels * outputs * inputs * prod(taps) / rates["conv_mac_per_s"]
    contracted += pixels * outputs / rates["values_per_s"]
    contracted += rates["compose_s"] * (len(members) - 1)
    contracted += composition / rates["compose_mac_per_s"]
    return FormCosts(expanded, contracted)


def _output_size(member: _Member, size: tuple[int, int]) -> tuple[int, int]:
    height, width = (
        max(0, (length - dilation * (taps - 1) - 1) // stride + 1)
        for length, taps, stride, dilation in zip(
            size, member.shape[2:], member.stride, member.dilation, strict=True
        )
    )
    return height, width


def trains_faster_contracted(kernels: Sequence[Kernel], x: Tensor, edges: Edges) -> bool:
    """Whether a training step takes less time in contracted form.

    On devices other than the CPU always: nothing was measured there, and the contracted form is
    the one that needs less memory.
    """
    if x.device.type != "cpu":
        return True
    costs = form_costs(kernels, x, edges)
    return costs.contracted <= costs.expanded
