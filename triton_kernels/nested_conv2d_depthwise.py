# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""The kernels of nested_conv2d with one input channel per group: direct sums, no tensor cores.

Shapes, with g the active groups and B = K / g outputs of each: x ``[N, g, H, W]``, weight
``[O, 1, R, S]``, y ``[N, g * B, P, Q]``; output channel k reads input channel k // B. Sums are
float32. A program owns what it writes; results repeat bit for bit.

Channels are read 16 bytes at once where they are innermost and their number and strides are
multiples of 16. Triton sees that only if it may specialise the channel numbers, and B on one, so
these are not among the run-time arguments below; nor are the strides of the input gradient, whose
divisions fall away with a stride of one.
"""

import triton
import triton.language as tl
from pyeff.triton_kernels.nested_conv2d_gemm import split_pixels
from pyeff.triton_kernels.nested_conv2d_layer import INT32_MAX, Layer, blocks
from pyeff.triton_kernels.tiles import DEPTHWISE, Tile
from torch import Tensor

_FORWARD_RUNTIME = [
    "pixels",
    "image",
    "P",
    "Q",
    "H",
    "W",
    "out_lo",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_FORWARD_RUNTIME)
def nested_conv2d_depthwise_forward_kernel(
    x, weight, bias, y,
    pixels, image, P, Q, H, W, K, per_group, out_lo,
    x_n, x_c, x_h, x_w, w_o, w_r, w_s, bias_o, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y[n,k,p,q] = f(bias[o(k)] + sum_{r,s} x[n,k//B,h,w] weight[o(k),0,r,s])

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns ROWS pixels by COLS channels of y.
    """
    col_blocks = tl.cdiv(K, COLS)
    row_block = tl.program_id(0) // col_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, p, q = split_pixels(m, image, Q)
    top, left = p * stride_h - pad_top, q * stride_w - pad_left
    k = ((tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    x_rows = x + n.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x_cols = (k // per_group) * x_c
    # Added to the pointer after the tap: the other order spills on sm_100 with Triton 3.6.
    w_cols = (out_lo + k) * w_o
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tap in range(0, R * S):
        r, s = tap // S, tap % S
        h, w = top + r * dil_h, left + s * dil_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_tap = tl.cast(r * dil_h, tl.int64) * x_h + tl.cast(s * dil_w, tl.int64) * x_w
        x_block = tl.load(
            (x_rows + x_tap)[:, None] + x_cols[None, :],
            mask=inside[:, None] & (k < K)[None, :],
            other=0.0,
        )
        w_block = tl.load(weight + r * w_r + s * w_s + w_cols, mask=k < K, other=0.0)
        total += x_block.to(tl.float32) * w_block.to(tl.float32)[None, :]

    if bias is not None:
        shift = tl.load(bias + (out_lo + k) * bias_o, mask=k < K, other=0.0)
        total += shift.to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_rows = y + n.to(tl.int64) * y_n + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
    tl.store(
        y_rows[:, None] + (k * y_c)[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < pixels)[:, None] & (k < K)[None, :],
    )


_GRAD_INPUT_RUNTIME = [
    "pixels",
    "image",
    "P",
    "Q",
    "W",
    "out_lo",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_GRAD_INPUT_RUNTIME)
def nested_conv2d_depthwise_grad_input_kernel(
    grad_y, weight, grad_x,
    pixels, image, P, Q, W, C, per_group, out_lo,
    y_n, y_c, y_h, y_w, w_o, w_r, w_s, x_n, x_c, x_h, x_w,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """grad_x[n,c,h,w] = sum_{b,r,s} grad_y[n,c*B+b,p,q] weight[o(c*B+b),0,r,s]

    over the taps for which p = (h + pad_top - r * dil_h) / stride_h, and q likewise, are whole.
    A program owns ROWS pixels by COLS channels of grad_x.
    """
    col_blocks = tl.cdiv(C, COLS)
    row_block = tl.program_id(0) // col_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, h, w = split_pixels(m, image, W)
    c = ((tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    y_images = grad_y + n.to(tl.int64) * y_n
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, R * S * per_group):
        tap, k = step // per_group, c * per_group + step % per_group
        r, s = tap // S, tap % S
        p, q = h + pad_top - r * dil_h, w + pad_left - s * dil_w
        inside = (m < pixels) & (p >= 0) & (q >= 0) & (p % stride_h == 0) & (q % stride_w == 0)
        p, q = p // stride_h, q // stride_w
        inside = inside & (p < P) & (q < Q)
        y_block = tl.load(
            (y_images + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w)[:, None] + (k * y_c)[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        w_cols = weight + (out_lo + k) * w_o + r * w_r + s * w_s
        w_block = tl.load(w_cols, mask=c < C, other=0.0)
        total += y_block.to(tl.float32) * w_block.to(tl.float32)[None, :]

    x_rows = grad_x + n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    tl.store(
        x_rows[:, None] + (c * x_c)[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=(m < pixels)[:, None] & (c < C)[None, :],
    )


_GRAD_WEIGHT_RUNTIME = [
    "pixels",
    "per_split",
    "splits",
    "image",
    "Q",
    "H",
    "W",
    "out_lo",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_GRAD_WEIGHT_RUNTIME)
def nested_conv2d_depthwise_grad_weight_kernel(
    grad_y, x, out,
    pixels, per_split, splits, image, Q, H, W, K, per_group, out_lo,
    y_n, y_c, y_h, y_w, x_n, x_c, x_h, x_w, out_split, out_o, out_r, out_s,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[split,o(k),0,r,s] = sum_{n,p,q in split} grad_y[n,k,p,q] x[n,k//B,h,w]

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns COLS channels of one tap and one share of the pixels.
    """
    col_blocks = tl.cdiv(K, COLS)
    program = tl.program_id(0)
    k = ((program % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    program = program // col_blocks
    r, s = (program % (R * S)) // S, (program % (R * S)) % S
    split = program // (R * S)
    if WIDE:
        split = split.to(tl.int64)
    y_cols, x_cols = grad_y + k * y_c, x + (k // per_group) * x_c
    total = tl.zeros((ROWS, COLS), tl.float32)
    start = split * per_split
    for first in range(start, tl.minimum(start + per_split, pixels), ROWS):
        m = first + tl.arange(0, ROWS)
        n, p, q = split_pixels(m, image, Q)
        h, w = p * stride_h - pad_top + r * dil_h, q * stride_w - pad_left + s * dil_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask = inside[:, None] & (k < K)[None, :]
        n = n.to(tl.int64)
        y_rows = n * y_n + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
        x_rows = n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        y_block = tl.load(y_rows[:, None] + y_cols[None, :], mask=mask, other=0.0)
        x_block = tl.load(x_rows[:, None] + x_cols[None, :], mask=mask, other=0.0)
        total += y_block.to(tl.float32) * x_block.to(tl.float32)

    out += split.to(tl.int64) * out_split + r * out_r + s * out_s
    tl.store(out + (out_lo + k) * out_o, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=k < K)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layer: Layer,
    relu: bool,
    precision: str,
    tile: Tile | None,
) -> None:
    """Launches the forward kernel on a y that is not empty; ``precision`` has no say here."""
    del precision  # no tensor cores: products are exact
    N, K, P, Q = y.shape
    pixels = N * P * Q
    tile = tile or DEPTHWISE
    w_o, _, w_r, w_s = weight.stride()
    grid = blocks(pixels, tile.rows) * blocks(K, tile.cols)
    nested_conv2d_depthwise_forward_kernel[(grid,)](
        x, weight, bias, y,
        pixels, P * Q, P, Q, x.shape[2], x.shape[3], K, layer.K, layer.outputs.lo,
        *x.stride(), w_o, w_r, w_s, 0 if bias is None else bias.stride(0), *y.stride(),
        *layer.window, layer.R, layer.S, relu,
        pixels + tile.rows > INT32_MAX, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    layer: Layer,
    precision: str,
    tile: Tile | None,
) -> None:
    """Launches the input gradient on a grad_x that is not empty."""
    del precision
    N, C, H, W = grad_x.shape
    pixels = N * H * W
    tile = tile or DEPTHWISE
    w_o, _, w_r, w_s = weight.stride()
    grid = blocks(pixels, tile.rows) * blocks(C, tile.cols)
    nested_conv2d_depthwise_grad_input_kernel[(grid,)](
        grad_y, weight, grad_x,
        pixels, H * W, *grad_y.shape[2:], W, C, layer.K, layer.outputs.lo,
        *grad_y.stride(), w_o, w_r, w_s, *grad_x.stride(),
        *layer.window, layer.R, layer.S,
        pixels + tile.rows > INT32_MAX, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    out: Tensor,  # [shares, O, 1, kh, kw]
    layer: Layer,
    target: Layer,
    precision: str,
    tile: Tile,
    per_share: int,
) -> None:
    """Launches the weight gradient: sums of ``per_share`` pixels each, one slice of out a share."""
    del precision
    N, K, P, Q = grad_y.shape
    pixels = N * P * Q
    shares = blocks(pixels, per_share)
    out_split, out_o, _, out_r, out_s = out.stride()
    nested_conv2d_depthwise_grad_weight_kernel[
        (blocks(K, tile.cols) * layer.R * layer.S * shares,)
    ](
        grad_y, x, out,
        pixels, per_share, shares, P * Q, Q, x.shape[2], x.shape[3], K, layer.K, target.outputs.lo,
        *grad_y.stride(), *x.stride(), out_split, out_o, out_r, out_s,
        *layer.window, layer.R, layer.S,
        pixels + per_share > INT32_MAX, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
