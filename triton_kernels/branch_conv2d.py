"""branch_conv2d on the GPU: the launchers of its Triton kernels.

The arguments are validated by ``pyeff.ops``; here they only become grids and strides. There is no
loop over branches or images, nothing waits for the device, and all sizes follow from shapes, so
every launcher can be captured in a CUDA graph once a first call has compiled its kernels. A route
that names no branch gives zeros and takes part in no gradient.

Inputs may have any strides; maps are read fastest with their channels innermost. A weight whose
input channels are not innermost is copied so once a call: each of its values is read for many
blocks of pixels, and this way by whole cache lines.

Every launcher takes ``tile`` (and ``shares``, the weight gradient's split of the pixels) to
override the table's choice: for tests and tuning.
"""

from collections.abc import Sequence
from math import gcd

import torch
from pyeff.triton_kernels import branch_conv2d_depthwise as depthwise
from pyeff.triton_kernels import branch_conv2d_gemm as gemm
from pyeff.triton_kernels.branch_conv2d_layer import (
    BranchLayer,
    branch_layer,
    empty_maps,
    inputs_innermost,
    map_strides,
)
from pyeff.triton_kernels.nested_conv2d_gemm import nested_conv2d_reduce_kernel
from pyeff.triton_kernels.nested_conv2d_layer import INT32_MAX, blocks, output_size
from pyeff.triton_kernels.tiles import (
    DEPTHWISE,
    Tile,
    arithmetic,
    choose,
    fit_depth,
    overflows_cache,
    pixel_shares,
    product_precision,
)
from pyeff.triton_kernels.top_k_routes import Plan, branch_plan
from torch import Tensor
from triton import next_power_of_2

_OP = "branch_conv2d"
_REDUCE_BLOCK = 1024
_SUM_ROWS, _SUM_COLS = 32, 64


def forward(
    x: Tensor,  # [N, C, H, W] or [N, k, C, H, W]
    weight: Tensor,  # [B, O, C / groups, kh, kw]
    bias: Tensor | None,  # [B, O]
    index: Tensor,  # [N, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
    precision: str | None = None,
    *,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> Tensor:  # [N, k, O, H', W']
    """Row (n, j): image n, or row (n, j) of x, convolved with branch index[n, j], plus its bias.

    Args:
        x: ``[N, C, H, W]``, shared by an image's branches, or ``[N, k, C, H, W]``; float16,
            bfloat16 or float32.
        weight: Stacked weights, ``[B, O, C / groups, kh, kw]``, dtype of ``x``.
        bias: Stacked biases, ``[B, O]``, or None.
        index: The routes' index, int32 ``[N, k]``, contiguous.
        stride: ``(height, width)``.
        padding: ``(top, bottom, left, right)``, in pixels, with zeros.
        dilation: ``(height, width)``.
        groups: Groups of one branch's convolution.
        activation: ``"relu"`` or None.
        precision: Products of float32: ``"tf32"`` or ``"ieee"``; None follows
            ``torch.backends.cudnn.conv.fp32_precision``, as torch's own convolution does.
        plan: The order in which the pairs are taken. By default they are ordered by branch where
            the stacked weights do not fit the cache together, and else taken as they come.
        tile: Instead of the table's choice.

    Returns:
        ``[N, k, O, H', W']``, O innermost in memory, dtype and device of ``x``. Deterministic.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``activation`` or ``precision`` is unknown.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"{_OP}: activation must be None or 'relu', got {activation!r}")
    precision = product_precision(_OP, x.dtype, precision)
    layer = branch_layer(weight.shape, index, (stride, padding, dilation), groups)
    H, W = x.shape[-2:]
    P = output_size(H, padding[0] + padding[1], layer.R, stride[0], dilation[0])
    Q = output_size(W, padding[2] + padding[3], layer.S, stride[1], dilation[1])
    y = empty_maps((*index.shape, weight.shape[1], P, Q), x)
    if y.numel() == 0:
        return y
    if plan is None and _order_pays(weight, layer):
        plan = branch_plan(index, layer.branches)
    order = None if plan is None else plan.order
    launch = depthwise.launch_forward if layer.depthwise else _forward_gemm
    weight = inputs_innermost(weight)
    with torch.cuda.device_of(x):
        launch(x, weight, bias, index, order, y, layer, activation == "relu", precision, tile)
    return y


def grad_input(
    grad_y: Tensor,  # [N, k, O, H', W']
    weight: Tensor,  # [B, O, C / groups, kh, kw]
    x_shape: Sequence[int],
    index: Tensor,  # [N, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:  # [N, C, H, W] or [N, k, C, H, W]
    """The gradient of the forward's x: for a shared x the sum over the image's k branches.

    Args:
        grad_y: Gradient of the result (before the activation), any strides.
        weight: As in the forward.
        x_shape: ``[N, C, H, W]`` or ``[N, k, C, H, W]``.
        index: As in the forward.
        stride: As in the forward.
        padding: As in the forward.
        dilation: As in the forward.
        groups: As in the forward.
        precision: As in the forward.
        tile: Instead of the table's choice.

    Returns:
        ``x_shape``, C innermost in memory, dtype and device of ``grad_y``. The branches of an image
        are summed in float32, in the order of its routes: deterministic.

    Raises:
        TypeError: ``grad_y`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` is unknown.
    """
    precision = product_precision(_OP, grad_y.dtype, precision)
    layer = branch_layer(weight.shape, index, (stride, padding, dilation), groups)
    grad_x = empty_maps(x_shape, grad_y)
    if grad_x.numel():
        launch = depthwise.launch_grad_input if layer.depthwise else _grad_input_gemm
        weight = inputs_innermost(weight)
        with torch.cuda.device_of(grad_y):
            launch(grad_y, weight, index, grad_x, layer, precision, tile)
    return grad_x


def grad_weight(
    grad_y: Tensor,  # [N, k, O, H', W']
    x: Tensor,  # [N, C, H, W] or [N, k, C, H, W]
    weight_shape: Sequence[int],
    index: Tensor,  # [N, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str | None = None,
    *,
    plan: Plan | None = None,
    tile: Tile | None = None,
    shares: int | None = None,
) -> Tensor:  # [B, O, C / groups, kh, kw]
    """The gradient of the stacked weights, exactly zero for a branch that nobody chose.

    Args:
        grad_y: Gradient of the result (before the activation), any strides.
        x: As in the forward.
        weight_shape: ``[B, O, C / groups, kh, kw]``.
        index: As in the forward.
        stride: As in the forward.
        padding: As in the forward.
        dilation: As in the forward.
        groups: As in the forward.
        precision: As in the forward.
        plan: The plan of ``index`` as it is now; computed here by default.
        tile: Instead of the table's choice.
        shares: Into how many shares a branch's pixels are split; default: enough to fill the
            device.

    Returns:
        ``weight_shape``, contiguous, dtype and device of ``x``. Summed in float32, in a fixed
        order: deterministic for one device.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` is unknown.
    """
    precision = product_precision(_OP, x.dtype, precision)
    layer = branch_layer(weight_shape, index, (stride, padding, dilation), groups)
    grad = torch.empty(tuple(weight_shape), dtype=x.dtype, device=x.device)
    if grad_y.numel() == 0 or x.numel() == 0 or grad.numel() == 0:
        return grad.zero_()
    pixels = layer.pairs * grad_y.shape[-2] * grad_y.shape[-1]
    per_branch = blocks(pixels, layer.branches)
    if layer.depthwise:
        tile = tile or DEPTHWISE
        depth, programs = tile.rows, blocks(layer.groups * layer.K, tile.cols)
    else:
        tile = tile or _grad_weight_tile(x, precision, layer, per_branch)
        depth = tile.depth
        programs = blocks(layer.K, tile.rows) * blocks(layer.C, tile.cols) * layer.groups
    programs *= layer.branches * layer.R * layer.S
    shares = shares or pixel_shares(x.device, programs, per_branch, depth)
    wide = pixels + shares * depth > INT32_MAX
    launch = depthwise.launch_grad_weight if layer.depthwise else _grad_weight_gemm
    with torch.cuda.device_of(x):
        plan = plan or branch_plan(index, layer.branches)
        out = grad if shares == 1 else empty_maps((shares, *weight_shape), x, torch.float32)
        launch(grad_y, x, plan, out, layer, shares, wide, precision, tile)
        if shares > 1:
            _sum_shares(out, grad)
    return grad


def grad_bias(
    grad_y: Tensor,  # [N, k, O, H', W']
    index: Tensor,  # [N, k]
    branches: int,
    *,
    plan: Plan | None = None,
) -> Tensor:  # [B, O]
    """The gradient of the stacked biases, exactly zero for a branch that nobody chose.

    Args:
        grad_y: Gradient of the result (before the activation), any strides.
        index: As in the forward.
        branches: B.
        plan: The plan of ``index`` as it is now; computed here by default.

    Returns:
        ``[B, O]``, dtype and device of ``grad_y``. Summed in float32, in a fixed order.
    """
    channels = grad_y.shape[2]
    grad = torch.empty((branches, channels), dtype=grad_y.dtype, device=grad_y.device)
    if grad_y.numel() == 0:
        return grad.zero_()
    with torch.cuda.device_of(grad_y):
        plan = plan or branch_plan(index, branches)
        sums = grad_y.sum(dim=(3, 4), dtype=torch.float32).reshape(-1, channels)
        gemm.branch_sum_kernel[(branches * blocks(channels, _SUM_COLS),)](
            sums, plan.order, plan.offsets, grad, channels, sums.stride(0), _SUM_ROWS, _SUM_COLS
        )
    return grad


def _forward_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    order: Tensor | None,
    y: Tensor,
    layer: BranchLayer,
    relu: bool,
    precision: str,
    tile: Tile | None,
) -> None:
    P, Q = y.shape[-2:]
    tile = tile or _gemm_tile(x, precision, P * Q, layer.K, layer.pairs * layer.groups)
    tile = fit_depth(tile, layer.C)
    grid = layer.pairs * layer.groups * blocks(P * Q, tile.rows) * blocks(layer.K, tile.cols)
    gemm.branch_conv2d_forward_kernel[(grid,)](
        x, weight, bias, index, order, y,
        P * Q, Q, *x.shape[-2:], layer.C, layer.K, layer.groups, layer.branches, layer.k,
        *map_strides(x), *weight.stride(), *((0, 0) if bias is None else bias.stride()),
        P * Q * y.shape[2], y.shape[2],
        *layer.window, layer.R, layer.S, relu, precision, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grad_input_gemm(
    grad_y: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_x: Tensor,
    layer: BranchLayer,
    precision: str,
    tile: Tile | None,
) -> None:
    H, W = grad_x.shape[-2:]
    stride_h, stride_w, _, _, dil_h, dil_w = layer.window
    class_h, class_w = blocks(H, stride_h), blocks(W, stride_w)
    terms = layer.k if grad_x.dim() == 4 else 1
    parts = layer.pairs // terms * layer.groups * min(stride_h, H) * min(stride_w, W)
    tile = tile or _gemm_tile(grad_y, precision, class_h * class_w, layer.C, parts)
    tile = fit_depth(tile, layer.K)
    common_h, common_w = gcd(stride_h, dil_h), gcd(stride_w, dil_w)
    grid = parts * blocks(class_h * class_w, tile.rows) * blocks(layer.C, tile.cols)
    channels = layer.groups * layer.C
    gemm.branch_conv2d_grad_input_kernel[(grid,)](
        grad_y, weight, index, grad_x,
        class_h * class_w, class_w, *grad_y.shape[-2:], H, W, layer.C, layer.K,
        layer.groups, layer.branches, layer.k, terms,
        *grad_y.stride(), *weight.stride(), H * W * channels, channels,
        *layer.window, stride_h // common_h, stride_w // common_w,
        dil_h // common_h, dil_w // common_w,
        layer.R, layer.S, next_power_of_2(terms), precision, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grad_weight_gemm(
    grad_y: Tensor,
    x: Tensor,
    plan: Plan,
    out: Tensor,  # [B, O, C / groups, kh, kw] or [shares, B, O, C / groups, kh, kw]
    layer: BranchLayer,
    shares: int,
    wide: bool,
    precision: str,
    tile: Tile,
) -> None:
    P, Q = grad_y.shape[-2:]
    grid = blocks(layer.K, tile.rows) * blocks(layer.C, tile.cols)
    grid *= layer.R * layer.S * layer.groups * shares * layer.branches
    gemm.branch_conv2d_grad_weight_kernel[(grid,)](
        grad_y, x, plan.order, plan.offsets, out,
        shares, P * Q, Q, *x.shape[-2:], layer.C, layer.K, layer.groups, layer.branches, layer.k,
        *grad_y.stride(), *map_strides(x), out.stride(-3), out.stride(-1),
        *layer.window, layer.R, layer.S, precision, wide, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _sum_shares(slices: Tensor, grad: Tensor) -> None:
    """grad = the sum of the slices [shares, B, O, C / groups, kh, kw], in their order."""
    rows, inputs = grad.shape[0] * grad.shape[1], grad.shape[2]
    flat = grad.flatten(0, 1)
    nested_conv2d_reduce_kernel[(blocks(grad.numel(), _REDUCE_BLOCK),)](
        slices, None, None, grad, slices.shape[0], grad.numel(), rows, inputs,
        0, 0, inputs, rows, *flat.stride(), grad.shape[3], grad.shape[4], _REDUCE_BLOCK,
    )  # fmt: skip


def _order_pays(weight: Tensor, layer: BranchLayer) -> bool:
    """Whether pairs of one branch should run together: the weights overflow half of the cache."""
    used = min(layer.pairs, layer.branches)  # distinct branches at most
    size = weight.numel() // layer.branches * used * weight.element_size()
    return layer.pairs > layer.branches and overflows_cache(weight.device, size)


def _gemm_tile(x: Tensor, precision: str, rows: int, cols: int, parts: int) -> Tile:
    return choose("branch", arithmetic(x.dtype, precision), x.device, rows, cols, parts)


def _grad_weight_tile(x: Tensor, precision: str, layer: BranchLayer, per_branch: int) -> Tile:
    # The taps, and the shares that the pixels can be split into, fill the device too.
    copies = layer.branches * layer.groups * layer.R * layer.S * max(1, per_branch // 256)
    kind = arithmetic(x.dtype, precision)
    return choose("branch_grad_weight", kind, x.device, layer.K, layer.C, copies)
