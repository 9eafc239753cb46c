"""factorized_conv2d on the CPU kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import _C
from pyeff.ops._conv_args import as_channels_last, empty_channels_last
from pyeff.ops._factorized_choice import Form, line_winograd
from pyeff.ops._factorized_pair import (
    ACTIVATIONS,
    BackwardCall,
    FactorPair,
    is_vertical_first,
    taps_of,
)
from pyeff.ops._factorized_torch import activate, activation_backward
from pyeff.ops._packed import packed_line

# Bias apart, what may follow a line: scale, shift, residual.
_NOTHING = (None, None, None)


class CppCall(NamedTuple):
    """What a forward call needs beside its tensors; depends on shapes only."""

    fused: bool
    winograd: bool
    middle: tuple[int, ...]  # shapes
    result: tuple[int, ...]
    problem: tuple[int, ...]  # of the fused call, or of the second line
    first_problem: tuple[int, ...]  # of the first line


def cpp_call(x: Tensor, w_first: Tensor, w_second: Tensor, pair: FactorPair, form: Form) -> CppCall:
    """The call for tensors of these shapes and the present number of threads."""
    taps, shape = taps_of(w_first), x.shape
    middle = pair.middle_size(shape, taps, is_vertical_first(w_first))
    result = pair.output_size(shape, taps)
    first = pair._replace(inner=None, outer=pair.inner)
    return CppCall(
        form.name == "fused",
        form.winograd,
        (shape[0], w_first.shape[0], *middle),
        (shape[0], w_second.shape[0], *result),
        _problem(pair, form.winograd),
        _problem(first, form.winograd),
    )


def forward(
    call: CppCall,
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    b_second: Tensor | None,
    *epilogue: Tensor | None,
    recording: bool = False,
) -> Tensor:
    """y [N, F, H', W'], channels_last.

    Args:
        call: See :func:`cpp_call`.
        x: [N, C, H, W].
        w_first: First weight.
        b_first: First bias.
        w_second: Second weight.
        b_second: Second bias.
        epilogue: Scale, shift and residual.
        recording: A gradient of the weights will follow: they are about to change.
    """
    y = empty_channels_last(x, *call.result)
    x = as_channels_last(x)
    packed_first = packed_second = None
    if not recording:
        packed_first = packed_line(w_first, call.winograd)
        packed_second = packed_line(w_second, call.winograd)
    scale, shift, residual = epilogue
    if residual is not None:
        residual = as_channels_last(residual)
    ends = (_contiguous(b_second), _contiguous(scale), _contiguous(shift), residual)
    b_first = _contiguous(b_first)
    if call.fused:
        _C.factorized_conv2d_forward(
            x, w_first, packed_first, b_first, w_second, packed_second, *ends, y, call.problem
        )
        return y
    middle = empty_channels_last(x, *call.middle)
    _C.factorized_conv2d_line_forward(
        x, w_first, packed_first, b_first, *_NOTHING, middle, call.first_problem
    )
    _C.factorized_conv2d_line_forward(middle, w_second, packed_second, *ends, y, call.problem)
    return y


def backward(call: BackwardCall) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_first, b_first, w_second and b_second, those that are wanted."""
    grad, x, w_first, b_first, w_second, pair, wanted = call
    vertical = is_vertical_first(w_first)
    grad, x = as_channels_last(grad), as_channels_last(x)
    through = any(wanted[:3])
    if not through and not wanted[3]:
        return None, None, None, None, _sum_over_pixels(grad) if wanted[4] else None
    before, after = _middle_map(x, w_first, b_first, pair)
    seconds = _grad_weight(grad, after, w_second, pair, not vertical, wanted[3:])
    if not through:
        return None, None, None, *seconds
    del after
    bend = None if pair.inner is None else before
    grad_middle = _grad_input(grad, w_second, before.shape, pair, not vertical, bend)
    del before, bend
    return (
        _grad_input(grad_middle, w_first, x.shape, pair, vertical) if wanted[0] else None,
        *_grad_weight(grad_middle, x, w_first, pair, vertical, wanted[1:3]),
        *seconds,
    )


def _middle_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: FactorPair
) -> tuple[Tensor, Tensor]:
    """Before and after the inner activation; one tensor where its derivative follows from that."""
    from_result = pair.inner in (None, "relu", "relu6")
    size = pair.middle_size(x.shape, taps_of(weight), is_vertical_first(weight))
    before = empty_channels_last(x, x.shape[0], weight.shape[0], *size)
    line = pair._replace(inner=None, outer=pair.inner if from_result else None)
    winograd = line_winograd(before, weight, pair)
    _C.factorized_conv2d_line_forward(
        x, weight, None, _contiguous(bias), *_NOTHING, before, _problem(line, winograd)
    )
    return before, before if from_result else activate(before.clone(), pair.inner)


def _grad_input(
    grad: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    pair: FactorPair,
    vertical: bool,
    before: Tensor | None = None,
) -> Tensor:
    """Gradient of a line's input of that shape; through the inner activation at ``before``."""
    result = empty_channels_last(grad, *shape)
    room = pair.dilation * (taps_of(weight) - 1) - pair.padding
    if pair.stride == 1 and room >= 0 and taps_of(weight) > 1:
        winograd = line_winograd(result, weight.transpose(0, 1), pair)
        problem = _problem(pair._replace(outer=None), winograd)
        _C.factorized_conv2d_line_grad_input(grad, weight, before, result, problem)
        return result
    problem = _nested_problem(weight, pair, vertical)
    _C.nested_conv2d_grad_input(grad, weight, result, None, None, problem)
    if before is None:
        return result
    return as_channels_last(activation_backward(result, before, pair.inner))


def _grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pair: FactorPair,
    vertical: bool,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a line's weight and bias, those that are wanted."""
    if not wanted[0]:
        return None, _sum_over_pixels(grad) if wanted[1] else None
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if taps_of(weight) == 1:  # it has no axis of its own
        problem = _nested_problem(weight, pair, vertical)
        _C.nested_conv2d_grad_weight(grad, x, result, None, None, problem)
        return result, _sum_over_pixels(grad) if wanted[1] else None
    bias = result.new_empty(weight.shape[0]) if wanted[1] else None
    problem = _problem(pair._replace(outer=None), False)
    _C.factorized_conv2d_line_grad_weight(grad, x, result, bias, problem)
    return result, bias


def _sum_over_pixels(grad: Tensor) -> Tensor:
    """[C] from [N, C, H, W]."""
    if grad.dtype not in (torch.float32, torch.float64):
        return grad.sum(dim=(0, 2, 3))
    # A product with ones takes a seventh of the time of sum() in channels_last.
    rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _problem(pair: FactorPair, winograd: bool) -> tuple[int, ...]:
    return (
        pair.stride,
        pair.padding,
        pair.dilation,
        ACTIVATIONS.index(pair.inner),
        ACTIVATIONS.index(pair.outer),
        int(winograd),
        torch.get_num_threads(),
    )


def _nested_problem(weight: Tensor, pair: FactorPair, vertical: bool) -> tuple[int, ...]:
    """Of nested_conv2d's kernels, whose gradients serve any convolution."""
    outputs, inputs = weight.shape[:2]
    stride, padding, dilation = pair.window(vertical)
    threads = torch.get_num_threads()
    return (0, inputs, 0, outputs, *stride, *padding, *dilation, 1, threads)
