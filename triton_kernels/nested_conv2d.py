"""nested_conv2d on the GPU: the launchers of its Triton kernels.

The arguments are validated by ``pyeff.ops``; here they only become grids and strides. Nothing
waits for the device, and nothing but outputs and the weight gradient's workspace is allocated, so
every launcher can be captured in a CUDA graph once a first call has compiled its kernels.

The full weight is read in place, by its strides; keep it channels_last (``[O, I, kh, kw]`` with I
innermost) for coalesced loads. x and grad_y may have any strides; channels_last is fastest.

Every launcher takes ``tile`` (and ``shares``, the weight gradient's split of the pixels) to
override the table's choice: for tests and tuning.
"""

from collections.abc import Callable, Sequence
from math import gcd

import torch
from pyeff.triton_kernels import nested_conv2d_depthwise as depthwise
from pyeff.triton_kernels import nested_conv2d_gemm as gemm
from pyeff.triton_kernels.nested_conv2d_layer import (
    INT32_MAX,
    Layer,
    Selection,
    Side,
    blocks,
    empty_channels_last,
    nested_layer,
    output_size,
)
from pyeff.triton_kernels.tiles import (
    DEPTHWISE,
    Tile,
    arithmetic,
    choose,
    fit_depth,
    pixel_shares,
    product_precision,
)
from torch import Tensor

_OP = "nested_conv2d"
_REDUCE_BLOCK = 1024


def forward(
    x: Tensor,  # [N, I', H, W]
    weight: Tensor,  # [O, I / groups, kh, kw]
    bias: Tensor | None,  # [O]
    in_sel: Selection,
    out_sel: Selection,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None = None,
    precision: str | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:  # [N, O', H', W']
    """The convolution of x with the selected part of the weight, plus bias, then the activation.

    Args:
        x: The selected input channels, ``[N, I', H, W]``; float16, bfloat16 or float32.
        weight: The full weight, ``[O, I / groups, kh, kw]``, dtype of ``x``.
        bias: The full bias, ``[O]``, or None.
        in_sel: Selected input channels of the full layer: ``(lo, hi)`` or an int64 tensor; with
            ``groups`` > 1 a range of whole groups.
        out_sel: Selected output channels, likewise.
        stride: ``(height, width)``.
        padding: ``(top, bottom, left, right)``, in pixels, with zeros.
        dilation: ``(height, width)``.
        groups: Groups of the full layer.
        activation: ``"relu"`` or None.
        precision: Products of float32: ``"tf32"`` or ``"ieee"``; None follows
            ``torch.backends.cudnn.conv.fp32_precision``, as torch's own convolution does.
        tile: Instead of the table's choice.

    Returns:
        ``[N, O', H', W']``, dtype and device of ``x``, channels_last. Deterministic.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``activation`` or ``precision`` is unknown.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"nested_conv2d: activation must be None or 'relu', got {activation!r}")
    precision = product_precision(_OP, x.dtype, precision)
    layer = nested_layer(weight.shape, in_sel, out_sel, (stride, padding, dilation), groups)
    P = output_size(x.shape[2], padding[0] + padding[1], layer.R, stride[0], dilation[0])
    Q = output_size(x.shape[3], padding[2] + padding[3], layer.S, stride[1], dilation[1])
    y = empty_channels_last((x.shape[0], layer.outputs.size, P, Q), x)
    if y.numel():
        launch = depthwise.launch_forward if layer.depthwise else _forward_gemm
        with torch.cuda.device_of(x):
            launch(x, weight, bias, y, layer, activation == "relu", precision, tile)
    return y


def grad_input(
    grad_y: Tensor,  # [N, O', H', W']
    weight: Tensor,  # [O, I / groups, kh, kw]
    x_shape: Sequence[int],
    in_sel: Selection,
    out_sel: Selection,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:  # [N, I', H, W]
    """The gradient of the forward's input; arguments as in :func:`forward`.

    Args:
        grad_y: Gradient of the result (before the activation), any strides.
        weight: As in the forward.
        x_shape: ``[N, I', H, W]`` of the forward's input.
        in_sel: As in the forward.
        out_sel: As in the forward.
        stride: As in the forward.
        padding: As in the forward.
        dilation: As in the forward.
        groups: As in the forward.
        precision: As in the forward.
        tile: Instead of the table's choice.

    Returns:
        ``x_shape``, dtype and device of ``grad_y``, channels_last. Deterministic.

    Raises:
        TypeError: ``grad_y`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` is unknown.
    """
    precision = product_precision(_OP, grad_y.dtype, precision)
    layer = nested_layer(weight.shape, in_sel, out_sel, (stride, padding, dilation), groups)
    grad_x = empty_channels_last(x_shape, grad_y)
    if grad_x.numel():
        launch = depthwise.launch_grad_input if layer.depthwise else _grad_input_gemm
        with torch.cuda.device_of(grad_y):
            launch(grad_y, weight, grad_x, layer, precision, tile)
    return grad_x


def grad_weight(
    grad_y: Tensor,  # [N, O', H', W']
    x: Tensor,  # [N, I', H, W]
    weight_shape: Sequence[int],
    in_sel: Selection,
    out_sel: Selection,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str | None = None,
    *,
    tile: Tile | None = None,
    shares: int | None = None,
) -> Tensor:  # [O, I / groups, kh, kw]
    """The gradient of the full weight, exactly zero outside of the selection.

    Args:
        grad_y: Gradient of the result (before the activation), any strides.
        x: As in the forward.
        weight_shape: ``[O, I / groups, kh, kw]``.
        in_sel: As in the forward.
        out_sel: As in the forward.
        stride: As in the forward.
        padding: As in the forward.
        dilation: As in the forward.
        groups: As in the forward.
        precision: As in the forward.
        tile: Instead of the table's choice.
        shares: Into how many shares the pixels are split; default: enough to fill the device.

    Returns:
        ``weight_shape``, dtype and device of ``x``, channels_last. Summed in float32, in a fixed
        order: deterministic for one device.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` is unknown.
    """
    precision = product_precision(_OP, x.dtype, precision)
    layer = nested_layer(weight_shape, in_sel, out_sel, (stride, padding, dilation), groups)
    grad = empty_channels_last(weight_shape, x)
    empty = grad_y.numel() == 0 or x.numel() == 0 or grad.numel() == 0
    if empty or not layer.is_whole:
        grad.zero_()
    if empty:
        return grad
    pixels = grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3]
    if layer.depthwise:
        tile = tile or DEPTHWISE
        depth, programs = tile.rows, blocks(grad_y.shape[1], tile.cols)
    else:
        tile = tile or _grad_weight_tile(x, precision, layer, pixels)
        depth = tile.depth
        programs = blocks(layer.K, tile.rows) * blocks(layer.C, tile.cols) * layer.groups
    if shares is None:
        shares = pixel_shares(x.device, programs * layer.R * layer.S, pixels, depth)
    per_share = blocks(blocks(pixels, shares), depth) * depth
    shares = blocks(pixels, per_share)
    launch = depthwise.launch_grad_weight if layer.depthwise else _grad_weight_gemm
    with torch.cuda.device_of(x):
        if shares == 1:
            launch(grad_y, x, grad.unsqueeze(0), layer, layer, precision, tile, per_share)
        else:
            _grad_weight_in_shares(launch, grad_y, x, grad, layer, precision, tile, per_share)
    return grad


def _forward_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layer: Layer,
    relu: bool,
    precision: str,
    tile: Tile | None,
) -> None:
    N, _, P, Q = y.shape
    pixels = N * P * Q
    tile = tile or _gemm_tile(x, precision, layer, pixels, layer.K, layer.groups)
    tile = fit_depth(tile, layer.C)
    grid = blocks(pixels, tile.rows) * blocks(layer.K, tile.cols) * layer.groups
    gemm.nested_conv2d_forward_kernel[(grid,)](
        x, weight, bias, layer.inputs.numbers, layer.outputs.numbers, y,
        pixels, P * Q, P, Q, x.shape[2], x.shape[3], layer.C, layer.K, *layer.selection,
        *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *y.stride(),
        *layer.window, layer.R, layer.S, relu, precision,
        pixels + tile.rows > INT32_MAX, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grad_input_gemm(
    grad_y: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    layer: Layer,
    precision: str,
    tile: Tile | None,
) -> None:
    N, _, H, W = grad_x.shape
    stride_h, stride_w, _, _, dil_h, dil_w = layer.window
    class_h, class_w = blocks(H, stride_h), blocks(W, stride_w)
    pixels, classes = N * class_h * class_w, min(stride_h, H) * min(stride_w, W)
    tile = tile or _gemm_tile(grad_y, precision, layer, pixels, layer.C, layer.groups * classes)
    tile = fit_depth(tile, layer.K)
    common_h, common_w = gcd(stride_h, dil_h), gcd(stride_w, dil_w)
    grid = blocks(pixels, tile.rows) * blocks(layer.C, tile.cols) * layer.groups * classes
    gemm.nested_conv2d_grad_input_kernel[(grid,)](
        grad_y, weight, layer.inputs.numbers, layer.outputs.numbers, grad_x,
        pixels, class_h * class_w, class_w, *grad_y.shape[2:], H, W, layer.C, layer.K,
        *layer.selection, *grad_y.stride(), *weight.stride(), *grad_x.stride(),
        *layer.window, stride_h // common_h, stride_w // common_w,
        dil_h // common_h, dil_w // common_w,
        layer.R, layer.S, precision,
        pixels + tile.rows > INT32_MAX, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grad_weight_gemm(
    grad_y: Tensor,
    x: Tensor,
    out: Tensor,  # [shares, O, I / groups, kh, kw]
    layer: Layer,
    target: Layer,  # where the sums go in out
    precision: str,
    tile: Tile,
    per_share: int,
) -> None:
    N, _, P, Q = grad_y.shape
    pixels = N * P * Q
    shares = blocks(pixels, per_share)
    grid = blocks(layer.K, tile.rows) * blocks(layer.C, tile.cols)
    grid *= layer.R * layer.S * layer.groups * shares
    gemm.nested_conv2d_grad_weight_kernel[(grid,)](
        grad_y, x, target.inputs.numbers, target.outputs.numbers, out,
        pixels, per_share, shares, P * Q, Q, x.shape[2], x.shape[3], layer.C, layer.K,
        *target.selection, *grad_y.stride(), *x.stride(), *out.stride(),
        *layer.window, layer.R, layer.S, precision,
        pixels + per_share > INT32_MAX, tile.rows, tile.cols, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _grad_weight_in_shares(
    launch: Callable[..., None],  # one of the two above
    grad_y: Tensor,
    x: Tensor,
    grad: Tensor,
    layer: Layer,
    precision: str,
    tile: Tile,
    per_share: int,
) -> None:
    """Sums each share of the pixels into a float32 slice of its own, then the slices in order."""
    outputs, inputs = layer.outputs.size, layer.C
    shares = blocks(grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3], per_share)
    workspace = torch.empty(
        (shares, outputs, layer.R, layer.S, inputs), dtype=torch.float32, device=x.device
    )
    compact = layer._replace(inputs=Side(0, inputs, None), outputs=Side(0, outputs, None))
    slices = workspace.permute(0, 1, 4, 2, 3)
    launch(grad_y, x, slices, layer, compact, precision, tile, per_share)
    count = workspace[0].numel()
    gemm.nested_conv2d_reduce_kernel[(blocks(count, _REDUCE_BLOCK),)](
        workspace, layer.inputs.numbers, layer.outputs.numbers, grad,
        shares, count, outputs, inputs, *layer.selection, *grad.stride(),
        layer.R, layer.S, _REDUCE_BLOCK,
    )  # fmt: skip


def _gemm_tile(x: Tensor, precision: str, layer: Layer, rows: int, cols: int, groups: int) -> Tile:
    by_range = layer.inputs.numbers is None and layer.outputs.numbers is None
    kind = arithmetic(x.dtype, precision)
    return choose("gemm" if by_range else "gather", kind, x.device, rows, cols, groups)


def _grad_weight_tile(x: Tensor, precision: str, layer: Layer, pixels: int) -> Tile:
    # The taps, and the shares that the pixels can be split into, fill the device too.
    copies = layer.groups * layer.R * layer.S * max(1, pixels // 256)
    kind = arithmetic(x.dtype, precision)
    return choose("grad_weight", kind, x.device, layer.K, layer.C, copies)
