"""factorized_conv2d on the CUDA kernels.

A pair runs as one kernel where one can take it, and else as two with an epilogue each. The backward
computes the middle map again. Weights are read fastest with what a sum runs over innermost in
memory, so they are copied to be so; the copy of a weight that does not change is kept.
"""

import torch
from torch import Tensor

from pyeff import _C as native
from pyeff.ops._conv_args import as_channels_last, empty_channels_last, tf32_allowed
from pyeff.ops._factorized_pair import (
    ACTIVATIONS,
    BackwardCall,
    FactorPair,
    is_vertical_first,
    taps_of,
)
from pyeff.ops._factorized_torch import activate

# What may follow a line beside its bias: scale, shift, residual.
_NOTHING = (None, None, None)
# Both are known from the result alone.
_FROM_RESULT = (None, "relu", "relu6")


def forward(
    pair: FactorPair,
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    b_second: Tensor | None,
    *epilogue: Tensor | None,
) -> Tensor:
    """y [N, F, H', W'], channels_last.

    Args:
        pair: How the convolutions lie, and the activations.
        x: [N, C, H, W].
        w_first: First weight.
        b_first: First bias.
        w_second: Second weight.
        b_second: Second bias.
        epilogue: Scale, shift and residual.
    """
    taps, vertical, problem = taps_of(w_first), is_vertical_first(w_first), _problem(pair)
    y = empty_channels_last(x, x.shape[0], w_second.shape[0], *pair.output_size(x.shape, taps))
    x, b_first = as_channels_last(x), _contiguous(b_first)
    scale, shift, residual = epilogue
    if residual is not None:
        residual = as_channels_last(residual)
    ends = (_contiguous(b_second), _contiguous(scale), _contiguous(shift), residual)
    w_first, w_second = (_weight(w) for w in (w_first, w_second))
    if native.factorized_conv2d_fits_cuda(w_first, w_second, y, problem):
        native.factorized_conv2d_forward_cuda(x, w_first, b_first, w_second, *ends, y, problem)
        return y
    first = _problem(pair._replace(inner=None, outer=pair.inner))
    middle = _empty_middle(x, w_first, pair)
    native.factorized_conv2d_line_forward_cuda(
        x, w_first, b_first, *_NOTHING, middle, vertical, first
    )
    native.factorized_conv2d_line_forward_cuda(middle, w_second, *ends, y, not vertical, problem)
    return y


def backward(call: BackwardCall) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_first, b_first, w_second and b_second, those that are wanted."""
    grad, x, w_first, b_first, w_second, pair, wanted = call
    vertical, pair = is_vertical_first(w_first), pair._replace(outer=None)
    grad, x = as_channels_last(grad), as_channels_last(x)
    through = any(wanted[:3])
    grad_b_second = _sum_over_pixels(grad) if wanted[4] else None
    if not through and not wanted[3]:
        return None, None, None, None, grad_b_second
    before = _middle_map(x, w_first, b_first, pair)
    grad_w_second = None
    if wanted[3]:
        after = before if pair.inner in _FROM_RESULT else activate(before.clone(), pair.inner)
        grad_w_second = _grad_weight(grad, after, w_second, pair, not vertical)
        del after
    if not through:
        return None, None, None, grad_w_second, grad_b_second
    bend = None if pair.inner is None else before
    grad_middle = _grad_input(grad, w_second, before.shape, pair, not vertical, bend)
    del before, bend
    return (
        _grad_input(grad_middle, w_first, x.shape, pair, vertical) if wanted[0] else None,
        _grad_weight(grad_middle, x, w_first, pair, vertical) if wanted[1] else None,
        _sum_over_pixels(grad_middle) if wanted[2] else None,
        grad_w_second,
        grad_b_second,
    )


def _empty_middle(x: Tensor, w_first: Tensor, pair: FactorPair) -> Tensor:
    size = pair.middle_size(x.shape, taps_of(w_first), is_vertical_first(w_first))
    return empty_channels_last(x, x.shape[0], w_first.shape[0], *size)


def _middle_map(x: Tensor, weight: Tensor, bias: Tensor | None, pair: FactorPair) -> Tensor:
    """Before the inner activation, or after one whose derivative follows from that."""
    before = _empty_middle(x, weight, pair)
    line = pair._replace(inner=None, outer=pair.inner if pair.inner in _FROM_RESULT else None)
    native.factorized_conv2d_line_forward_cuda(
        x,
        _weight(weight),
        _contiguous(bias),
        *_NOTHING,
        before,
        is_vertical_first(weight),
        _problem(line),
    )
    return before


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
    # The sum runs over the outputs.
    weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    problem = _problem(pair)
    native.factorized_conv2d_line_grad_input_cuda(grad, weight, before, result, vertical, problem)
    return result


def _grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, pair: FactorPair, vertical: bool
) -> Tensor:
    result, problem = weight.new_empty(weight.shape), _problem(pair)
    elements = native.factorized_conv2d_partial_elements_cuda(grad, result, problem)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(elements, dtype=dtype)
    native.factorized_conv2d_line_grad_weight_cuda(grad, x, result, partial, vertical, problem)
    return result


def _sum_over_pixels(maps: Tensor) -> Tensor:
    return maps.sum(dim=(0, 2, 3))


def _weight(weight: Tensor) -> Tensor:
    """The weight with its input channels innermost in memory; see _branch_conv2d_cuda.py."""
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return weight
    return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _problem(pair: FactorPair) -> tuple[int, ...]:
    return (
        pair.stride,
        pair.padding,
        pair.dilation,
        ACTIVATIONS.index(pair.inner),
        ACTIVATIONS.index(pair.outer),
        int(tf32_allowed()),
        1,
    )
