"""Native kernels; see csrc/bindings. Every tensor stays owned by the caller."""

from typing import Any

from torch import Tensor

version: str
compiler: str

def cuda_info() -> dict[str, Any]: ...
def call_key(x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bytes: ...
def isa() -> str: ...
def run_fma_loop(repeats: int, threads: int) -> float: ...
def available_isas() -> list[str]: ...
def force_isa(name: str | None) -> None: ...
def nested_conv2d_packed_elements(weight: Tensor, groups: int) -> int: ...
def nested_conv2d_pack(weight: Tensor, packed: Tensor, groups: int, threads: int) -> None: ...
def nested_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def sampler_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...

# CUDA; problem ends with (tf32, large tiles, shares) in place of threads. workspace is None with
# one share, else [shares, elements] in the type of the sums: the elements of y, of grad_x, or
# o * kh * kw * i / groups. grad_weight is written at the selection alone.
def nested_conv2d_forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    workspace: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_input_cuda(
    grad_y: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    workspace: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_weight_cuda(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    workspace: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...

# --- branches; B branches, k of them for each of N images -----------------------------------------
#
# index is int32 [N, k], contiguous; a value outside of [0, B) is a ValueError that names it.
# Maps have their channels side by side (channel stride 1); images, pairs, rows and columns may be
# strided. A map that all k branches of an image share has 4 dimensions, one for each pair 5:
#   x, grad_x    [N, C, H, W] or [N, k, C, H, W]
#   y, grad_y    [N, k, O, H', W']
# weight and grad_weight are contiguous [B, O, C / groups, kh, kw], bias and grad_bias contiguous
# [B, O]; all floating-point tensors of a call have one dtype. Every element of an output is
# written; the same branch may appear twice for an image.
# problem: (stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups, threads)

# Elements of the packed form of weight; it is float32, or float64 for a float64 weight.
def branch_conv2d_packed_elements(weight: Tensor, groups: int) -> int: ...
def branch_conv2d_pack(weight: Tensor, packed: Tensor, groups: int, threads: int) -> None: ...
def branch_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...

# A shared grad_x is summed over the k branches of an image, in an order that the index decides.
def branch_conv2d_grad_input(
    grad_y: Tensor, weight: Tensor, index: Tensor, grad_x: Tensor, problem: tuple[int, ...]
) -> None: ...

# Both are exactly zero for branches that no image chose.
def branch_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...

# CUDA: weight (of grad_input [B, C, O / groups, kh, kw]) has its third dimension innermost in
# memory; grad_weight is contiguous. order and offsets are what branch_plan_cuda wrote.
def branch_conv2d_forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...
def branch_conv2d_grad_input_cuda(
    grad_y: Tensor, weight: Tensor, index: Tensor, grad_x: Tensor, problem: tuple[int, ...]
) -> None: ...
def branch_conv2d_grad_weight_cuda(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    order: Tensor,
    offsets: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...

# out[n] = bias + sum_j route_weight[n, j] * projection[index[n, j]] @ y[n, j]
# y and grad_y [N, k, F] with feature stride 1. Contiguous: projection, grad_projection [B, O, F],
# bias [O], route_weight, grad_route_weight [N, k], out, grad_out [N, O]; all of one floating-point
# dtype. packed is branch_conv2d_pack's form of projection as
# [B, O, F, 1, 1], groups 1. The gradient of bias is grad_out.sum(0).
def combine_forward(
    y: Tensor,
    projection: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    route_weight: Tensor,
    out: Tensor,
    threads: int,
) -> None: ...

# Either output may be None. y is read only for grad_route_weight.
def combine_grad_input(
    grad_out: Tensor,
    y: Tensor,
    projection: Tensor,
    index: Tensor,
    route_weight: Tensor,
    grad_y: Tensor | None,
    grad_route_weight: Tensor | None,
    threads: int,
) -> None: ...

# Exactly zero for branches that no image chose.
def combine_grad_projection(
    grad_out: Tensor,
    y: Tensor,
    index: Tensor,
    route_weight: Tensor,
    grad_projection: Tensor,
    threads: int,
) -> None: ...

# CUDA: the same on a GPU, with the pairs by branch that branch_plan_cuda wrote.
def combine_forward_cuda(
    y: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    index: Tensor,
    route_weight: Tensor,
    out: Tensor,
) -> None: ...
def combine_grad_input_cuda(
    grad_out: Tensor,
    y: Tensor,
    projection: Tensor,
    index: Tensor,
    route_weight: Tensor,
    grad_y: Tensor | None,
    grad_route_weight: Tensor | None,
) -> None: ...
def combine_grad_projection_cuda(
    grad_out: Tensor,
    y: Tensor,
    index: Tensor,
    order: Tensor,
    offsets: Tensor,
    route_weight: Tensor,
    grad_projection: Tensor,
) -> None: ...

# scores [N, B], any floating-point dtype, any strides; index int32 [N, k], contiguous, is written:
# by falling score, ties to the lower number. NaN is a ValueError, and so is k > B.
def top_k_routes(scores: Tensor, index: Tensor) -> None: ...

# CUDA: weight and its gradient [N, k] and grad_scores [N, B] are contiguous, of one dtype; order
# int32 [N * k], offsets int32 [B + 1]. See csrc/pyeff/top_k_routes.h.
def top_k_routes_cuda(scores: Tensor, index: Tensor, weight: Tensor, softmax: bool) -> None: ...
def top_k_routes_grad_cuda(
    grad_weight: Tensor, index: Tensor, weight: Tensor, grad_scores: Tensor
) -> None: ...
def branch_plan_cuda(index: Tensor, order: Tensor, offsets: Tensor) -> None: ...

# --- a whole branch; see csrc/pyeff/branch_stage.h ------------------------------------------------

class BranchStageProgram:
    def __init__(self, integers: list[int]) -> None: ...
    @property
    def packed_elements(self) -> int: ...

# The program's parameters, [B, ...] with any strides, of one floating-point dtype; packed is
# float32, or float64 for float64 parameters.
def branch_stage_pack(
    program: BranchStageProgram, tensors: list[Tensor], packed: Tensor, threads: int
) -> None: ...

# x [N, C, H, W] or [N, k, C, H, W] (or without H and W), channel stride 1; index int32 [N, k],
# contiguous; y [N, k, C', H', W'] with C' innermost, or [N, k, F'] contiguous.
def branch_stage_forward(
    program: BranchStageProgram, x: Tensor, index: Tensor, packed: Tensor, y: Tensor, threads: int
) -> None: ...

# CUDA: weights [B, ...] in the dtype of x and vectors [B, ...] in that of its sums, in the form of
# csrc/cuda/branch_stage_layout.h. NotImplementedError for what a block cannot hold.
def branch_stage_forward_cuda(
    program: BranchStageProgram,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    vectors: Tensor,
    y: Tensor,
) -> None: ...

# --- factorised pairs; see csrc/pyeff/factorized_conv2d.h -----------------------------------------
#
# A line is a 1-D convolution with weight [O, I, n, 1] (vertical) or [O, I, 1, n] (horizontal), any
# strides. Maps have their channels side by side (channel stride 1); images, rows and columns may be
# strided. All maps and weights of a call have one dtype; biases [O], scale and shift [F] are
# contiguous and of that dtype or another floating-point one.
# problem: (stride, padding, dilation, inner, outer, winograd, threads); inner and outer number
# the activations None, relu, relu6, silu, hardswish from 0. winograd is 0 or 1; 1 needs float32,
# three taps and stride 1. Every element of y is written.

# Elements of the packed form of one line's weight; it is float32, or float64 for a float64 weight.
# A copy that is packed with winograd serves only calls with winograd, and one without only those
# without.
def factorized_conv2d_packed_elements(weight: Tensor, winograd: bool) -> int: ...
def factorized_conv2d_pack(weight: Tensor, packed: Tensor, winograd: bool) -> None: ...

# y = outer(scale * (second(inner(first(x) + b_first)) + b_second) + shift + residual), [N, F, H, W]
# x [N, C, H, W]; residual like y. A line without a packed copy is packed for the call.
def factorized_conv2d_forward(
    x: Tensor,
    w_first: Tensor,
    packed_first: Tensor | None,
    b_first: Tensor | None,
    w_second: Tensor,
    packed_second: Tensor | None,
    b_second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...

# One line alone: y = outer(scale * (line(x) + bias) + shift + residual); inner is not used. Stride,
# padding and dilation act along the line only.
def factorized_conv2d_line_forward(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...

# Gradient of a line's input: grad_x like x. Needs stride 1, padding <= dilation * (n - 1). With
# before, like x, it is multiplied by the derivative of the activation inner there; of relu and
# relu6 their results serve as well.
def factorized_conv2d_line_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    before: Tensor | None,
    grad_x: Tensor,
    problem: tuple[int, ...],
) -> None: ...

# Gradients of a line's weight, any strides, and bias [O], contiguous; any stride of the line.
# inner, outer and winograd are not used.
def factorized_conv2d_line_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...

# CUDA: the same on a GPU, without packed forms; in place of winograd stands tf32, whether products
# of float32 are rounded to TF32. Weights are read fastest with what a sum runs over innermost.
# Biases, scale and shift have the dtype of the maps or float32. A pair may be run by one kernel
# where it fits; a line has any stride and padding. partial is contiguous, float32, or float64 for
# float64 maps. Maps of 2^30 pixels or more are a NotImplementedError.
def factorized_conv2d_fits_cuda(
    w_first: Tensor, w_second: Tensor, y: Tensor, problem: tuple[int, ...]
) -> bool: ...
def factorized_conv2d_forward_cuda(
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    b_second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    problem: tuple[int, ...],
) -> None: ...
def factorized_conv2d_line_forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    vertical: bool,
    problem: tuple[int, ...],
) -> None: ...
def factorized_conv2d_line_grad_input_cuda(
    grad_y: Tensor,
    weight: Tensor,
    before: Tensor | None,
    grad_x: Tensor,
    vertical: bool,
    problem: tuple[int, ...],
) -> None: ...
def factorized_conv2d_partial_elements_cuda(
    grad_y: Tensor, weight: Tensor, problem: tuple[int, ...]
) -> int: ...
def factorized_conv2d_line_grad_weight_cuda(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    partial: Tensor,
    vertical: bool,
    problem: tuple[int, ...],
) -> None: ...
