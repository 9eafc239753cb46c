"""nested_conv2d on the CUDA kernels.

A weight in channels_last is read 16 bytes at a time where its selected channels are aligned to
that; every other one is read where it lies, number by number.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyeff import _C as native
from pyeff.ops._conv_args import Pair, Sides, as_channels_last, empty_channels_last, tf32_allowed

_SMALL, _LARGE = 64, 128  # rows and columns of a tile
_DEPTH_BYTES = 64  # of the terms of a step
_FEWEST_STEPS = 8  # of a share: each costs a copy of the result in the type of the sums
_DEPTHWISE_CHANNELS = 32  # of a block of the depth-wise weight gradient
_DEPTHWISE_PIXELS = 512  # of a share of it, at least


class Layer(Protocol):
    """What the kernels ask of a Conv."""

    @property
    def in_selection(self) -> Pair | Tensor: ...
    @property
    def out_selection(self) -> Pair | Tensor: ...
    @property
    def stride(self) -> Pair: ...
    @property
    def padding(self) -> Sides: ...
    @property
    def dilation(self) -> Pair: ...
    @property
    def groups(self) -> int: ...


class Plan(NamedTuple):
    """How the device sums.

    Attributes:
        tf32: float32 factors are rounded to ten bits, for the tensor cores.
        large: Tiles of 128 x 128 in place of 64 x 64.
        shares: Into how many parts the terms of a sum are split.
    """

    tf32: bool
    large: bool
    shares: int


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    conv: Layer,
    plan: Plan | None = None,
) -> Tensor:
    """y of that shape, channels_last. ``plan`` is chosen by the shapes where it is None."""
    x = as_channels_last(x)
    y = empty_channels_last(x, *shape)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if plan is None:
        groups, outs, ins = _per_group(weight, conv)
        terms = ins * weight.shape[2] * weight.shape[3]
        plan = _plan_of_map(x, (_pixels(y), outs, terms), groups, weight, conv)
    workspace = _workspace(plan.shares, y.numel(), x)
    native.nested_conv2d_forward_cuda(
        x, weight, bias, y, workspace, *_indices(conv), _problem(conv, plan)
    )
    return y


def grad_input(
    grad_y: Tensor,
    weight: Tensor,
    shape: tuple[int, int, int, int],
    conv: Layer,
    plan: Plan | None = None,
) -> Tensor:
    """Gradient of x, of that shape, channels_last."""
    grad_y = as_channels_last(grad_y)
    grad_x = empty_channels_last(grad_y, *shape)
    if plan is None:
        groups, outs, ins = _per_group(weight, conv)
        # Of the taps a pixel has those that the stride leaves it.
        taps = max(1, weight.shape[2] * weight.shape[3] // (conv.stride[0] * conv.stride[1]))
        plan = _plan_of_map(grad_y, (_pixels(grad_x), ins, outs * taps), groups, weight, conv)
    workspace = _workspace(plan.shares, grad_x.numel(), grad_y)
    native.nested_conv2d_grad_input_cuda(
        grad_y, weight, grad_x, workspace, *_indices(conv), _problem(conv, plan)
    )
    return grad_x


def grad_weight(
    grad_y: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    conv: Layer,
    plan: Plan | None = None,
) -> Tensor:
    """Gradient of the full weight, of that shape and these strides; zero outside of the part."""
    grad_y, x = as_channels_last(grad_y), as_channels_last(x)
    result = x.new_empty_strided(shape, strides).zero_()
    groups, outs, ins = _per_group(result, conv)
    taps = shape[2] * shape[3]
    if plan is None and _is_depthwise(result, conv):
        blocks = -(-groups // _DEPTHWISE_CHANNELS) * taps
        shares = min(2 * _processors(x) // max(1, blocks), _pixels(grad_y) // _DEPTHWISE_PIXELS)
        plan = Plan(False, False, max(1, shares))
    elif plan is None:
        plan = _plan(x, (outs, ins, _pixels(grad_y)), groups * taps)
    workspace = _workspace(plan.shares, groups * outs * taps * ins, x)
    native.nested_conv2d_grad_weight_cuda(
        grad_y, x, result, workspace, *_indices(conv), _problem(conv, plan)
    )
    return result


def _plan_of_map(
    t: Tensor, product: tuple[int, int, int], groups: int, weight: Tensor, conv: Layer
) -> Plan:
    if _is_depthwise(weight, conv):  # a thread sums a number: nothing to choose
        return Plan(False, False, 1)
    return _plan(t, product, groups)


def _plan(t: Tensor, product: tuple[int, int, int], copies: int) -> Plan:
    """Large tiles where they fill the device, shares where even small ones do not.

    Args:
        t: A factor.
        product: Rows, columns and terms of one product.
        copies: How many products there are.
    """
    rows, columns, terms = product
    size = t.element_size()
    tf32 = t.dtype == torch.float32 and tf32_allowed()
    processors = _processors(t)

    def blocks(tile: int) -> int:
        return -(-rows // tile) * -(-columns // tile) * copies

    if (size == 2 or tf32) and blocks(_LARGE) >= processors:
        return Plan(tf32, True, 1)
    steps = -(-terms * size // _DEPTH_BYTES)
    shares = min(2 * processors // max(1, blocks(_SMALL)), steps // _FEWEST_STEPS)
    return Plan(tf32, False, max(1, shares))


def _processors(t: Tensor) -> int:
    if not t.is_cuda:  # the kernels run on the host, in tests
        return 2
    return int(torch.cuda.get_device_properties(t.device).multi_processor_count)


def _workspace(shares: int, elements: int, like: Tensor) -> Tensor | None:
    if shares == 1:
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((shares, elements), dtype=dtype)


def _count(selection: Pair | Tensor) -> int:
    if isinstance(selection, Tensor):
        return selection.shape[0]
    return selection[1] - selection[0]


def _pixels(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def _per_group(weight: Tensor, conv: Layer) -> tuple[int, int, int]:
    """How many groups take part, and the output and input channels of one."""
    inputs = _count(conv.in_selection)
    if conv.groups == 1:
        return 1, _count(conv.out_selection), inputs
    return inputs // weight.shape[1], weight.shape[0] // conv.groups, weight.shape[1]


def _is_depthwise(weight: Tensor, conv: Layer) -> bool:
    return conv.groups > 1 and weight.shape[0] == conv.groups and weight.shape[1] == 1


def _indices(conv: Layer) -> tuple[Tensor | None, Tensor | None]:
    inputs, outputs = conv.in_selection, conv.out_selection
    return (
        inputs.contiguous() if isinstance(inputs, Tensor) else None,
        outputs.contiguous() if isinstance(outputs, Tensor) else None,
    )


def _problem(conv: Layer, plan: Plan) -> tuple[int, ...]:
    inputs, outputs = conv.in_selection, conv.out_selection
    top, _, left, _ = conv.padding
    return (
        0 if isinstance(inputs, Tensor) else inputs[0],
        _count(inputs),
        0 if isinstance(outputs, Tensor) else outputs[0],
        _count(outputs),
        *conv.stride,
        top,
        left,
        *conv.dilation,
        conv.groups,
        int(plan.tf32),
        int(plan.large),
        plan.shares,
    )
