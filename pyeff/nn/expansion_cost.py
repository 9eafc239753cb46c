"""Which form of an expanded layer is faster to train: the one place that decides.

The chain costs multiply-adds at every pixel, the contracted form a composition of the weights once
a step and then the multiply-adds of the compact layer. So the chain can only win on few pixels. The
times are those that ``benchmarks/ops/expanded_forms.py`` measured on the processor which
``pyeff/ops/tables/cpu.json`` names.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

from torch import Tensor

from pyeff.nn.contraction import Kernel, Pair, Shape, composition_macs
from pyeff.nn.expansion_plan import Edges
from pyeff.ops._dispatch import measured_rates

OP = "expanded_conv2d"


class Work(NamedTuple):
    """What a form does in a step; the table has the seconds of one each, backward included."""

    convs: int = 0  # calls
    macs: int = 0  # multiply-adds in them
    grouped_macs: int = 0  # the same where channels are grouped: slower
    values: int = 0  # numbers of the maps that they write
    weights: int = 0  # numbers of their weights
    compositions: int = 0  # of two kernels
    composition_macs: int = 0
    linears: int = 0  # matrix products
    linear_macs: int = 0

    def seconds(self, rates: Mapping[str, float]) -> float:
        """The time of a step, forward and backward."""
        return sum(rates[name] * count for name, count in self._asdict().items())


class Forms(NamedTuple):
    """The work of both forms of a layer."""

    expanded: Work
    contracted: Work


class _Member(NamedTuple):
    shape: Shape
    stride: Pair
    dilation: Pair


def conv_forms(kernels: Sequence[Kernel], x: Tensor, edges: Edges) -> Forms:
    """The work of a chain of convolutions on an input.

    Args:
        kernels: the members.
        x: ``[N, C, H, W]`` or ``[C, H, W]``.
        edges: padding of x.
    """
    members = tuple(_Member(k.shape, k.stride, k.dilation) for k in kernels)
    left, right, top, bottom = edges
    size = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    batch = x.shape[0] if x.ndim == 4 else 1
    return _conv_forms(members, batch, size)


@lru_cache(maxsize=4096)
def _conv_forms(members: tuple[_Member, ...], batch: int, size: Pair) -> Forms:
    composition = composition_macs([member.shape for member in members])
    macs, values, taps = 0, 0, [1, 1]
    for member in members:
        size = _output_size(member, size)
        macs += batch * prod(size) * prod(member.shape)
        values += batch * prod(size) * member.shape[0]
        taps = [t + k - 1 for t, k in zip(taps, member.shape[2:], strict=True)]
    pixels = batch * prod(size)
    outputs, weights = members[-1].shape[0], members[-1].shape[0] * members[0].shape[1] * prod(taps)
    grouped = members[0].shape[0] != members[1].shape[1]
    kind = "grouped_macs" if grouped else "macs"
    chain = {kind: macs, "values": values, "weights": sum(prod(m.shape) for m in members)}
    compact = {kind: pixels * weights, "values": pixels * outputs, "weights": weights}
    composed = {"compositions": len(members) - 1, "composition_macs": composition}
    return Forms(Work(convs=len(members), **chain), Work(convs=1, **compact, **composed))


def _output_size(member: _Member, size: Pair) -> Pair:
    height, width = (
        max(0, (length - dilation * (taps - 1) - 1) // stride + 1)
        for length, taps, stride, dilation in zip(
            size, member.shape[2:], member.stride, member.dilation, strict=True
        )
    )
    return height, width


def linear_forms(features: Sequence[int], rows: int) -> Forms:
    """The work of a chain of three linear layers.

    Args:
        features: of the input, between the members and of the output.
        rows: vectors of the input.
    """
    inputs, first, second, outputs = features
    macs = rows * sum(a * b for a, b in pairwise(features))
    # From the end with fewer features.
    middle = second if inputs <= outputs else first
    composition = min(inputs, outputs) * first * second + inputs * middle * outputs
    return Forms(
        Work(linears=3, linear_macs=macs),
        Work(linears=3, linear_macs=composition + rows * inputs * outputs),
    )


def trains_faster_contracted(forms: Forms, x: Tensor) -> bool:
    """Whether a training step takes less time in contracted form.

    On devices other than the CPU always: nothing was measured there, and the contracted form is
    the one that needs less memory.

    Args:
        forms: of the layer.
        x: gives device and dtype.
    """
    if x.device.type != "cpu":
        return True
    rates = measured_rates(OP, x)
    return forms.contracted.seconds(rates) <= forms.expanded.seconds(rates)
