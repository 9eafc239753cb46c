# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""The kernels of branch_conv2d with one input channel per group: direct sums, no tensor cores.

Shapes, with g groups of A outputs: x ``[N, g, H, W]`` or ``[N, k, g, H, W]``, weight
``[B, g * A, 1, R, S]``, y ``[N, k, g * A, P, Q]``; output channel o reads input channel o // A.
As in ``branch_conv2d_gemm``, a block of pixels lies inside one pair, a route that names no branch
counts as a branch of zeros, and sums are float32 without atomics.

What is specialised and what is a run-time argument is as in ``nested_conv2d_depthwise``: else every
channel would be read by a load of its own.
"""

import triton
import triton.language as tl
from pyeff.triton_kernels.branch_conv2d_gemm import branch_of, pair_offset, share_of
from pyeff.triton_kernels.branch_conv2d_layer import BranchLayer, map_strides
from pyeff.triton_kernels.nested_conv2d_layer import blocks
from pyeff.triton_kernels.tiles import DEPTHWISE, Tile
from pyeff.triton_kernels.top_k_routes import Plan
from torch import Tensor

_FORWARD_RUNTIME = [
    "image",
    "Q",
    "H",
    "W",
    "branches",
    "k",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_FORWARD_RUNTIME)
def branch_conv2d_depthwise_forward_kernel(
    x, weight, bias, index, order, y,
    image, Q, H, W, K, per_group, branches, k,
    x_n, x_j, x_c, x_h, x_w, w_b, w_o, w_r, w_s, bias_b, bias_o, y_pair, y_pixel,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y[n,j,o,p,q] = f(bias[b,o] + sum_{r,s} x[n,j,o//A,h,w] weight[b,o,0,r,s]), b = index[n,j]

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns ROWS pixels of one pair by COLS channels of y.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(K, COLS)
    row_blocks = tl.cdiv(image, ROWS)
    o = ((program % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    program = program // col_blocks
    m = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    pair = program // row_blocks
    if order is not None:
        pair = tl.load(order + pair)
    branch, exists = branch_of(index, pair, branches)
    o_exists = (o < K) & exists
    p, q = m // Q, m % Q
    top, left = p * stride_h - pad_top, q * stride_w - pad_left
    x_rows = x + pair_offset(pair, k, x_n, x_j) + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x_cols = (o // per_group) * x_c
    w_cols = weight + branch * w_b + o * w_o
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tap in range(0, R * S):
        r, s = tap // S, tap % S
        h, w = top + r * dil_h, left + s * dil_w
        inside = (m < image) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_tap = tl.cast(r * dil_h, tl.int64) * x_h + tl.cast(s * dil_w, tl.int64) * x_w
        x_block = tl.load(
            (x_rows + x_tap)[:, None] + x_cols[None, :],
            mask=inside[:, None] & o_exists[None, :],
            other=0.0,
        )
        w_block = tl.load(w_cols + r * w_r + s * w_s, mask=o_exists, other=0.0)
        total += x_block.to(tl.float32) * w_block.to(tl.float32)[None, :]

    if bias is not None:
        shift = tl.load(bias + branch * bias_b + o * bias_o, mask=o_exists, other=0.0)
        total += shift.to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_rows = y + pair.to(tl.int64) * y_pair + m.to(tl.int64) * y_pixel
    tl.store(
        y_rows[:, None] + o[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < image)[:, None] & (o < K)[None, :],
    )


_GRAD_INPUT_RUNTIME = [
    "image",
    "P",
    "Q",
    "W",
    "branches",
    "k",
    "terms",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_GRAD_INPUT_RUNTIME)
def branch_conv2d_depthwise_grad_input_kernel(
    grad_y, weight, index, grad_x,
    image, P, Q, W, C, per_group, branches, k, terms,
    y_n, y_j, y_c, y_h, y_w, w_b, w_o, w_r, w_s, x_slot, x_pixel,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """grad_x[slot,c,h,w] = sum_{j,a,r,s} grad_y[n,j,c*A+a,p,q] weight[b,c*A+a,0,r,s]

    with b = index[n,j], over the taps for which p = (h + pad_top - r * dil_h) / stride_h, and q
    likewise, are whole.
    A slot is an image whose k pairs are summed in order (terms = k), or one pair (terms = 1).
    A program owns ROWS pixels of one slot by COLS channels of grad_x.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(image, ROWS)
    c = ((program % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    program = program // col_blocks
    m = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    slot = program // row_blocks
    h, w = m // W, m % W
    per_pair = R * S * per_group
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, terms * per_pair):
        pair = slot * terms + step // per_pair
        branch, exists = branch_of(index, pair, branches)
        c_exists = (c < C) & exists
        tap, o = (step % per_pair) // per_group, c * per_group + step % per_group
        r, s = tap // S, tap % S
        p, q = h + pad_top - r * dil_h, w + pad_left - s * dil_w
        inside = (m < image) & (p >= 0) & (q >= 0) & (p % stride_h == 0) & (q % stride_w == 0)
        p, q = p // stride_h, q // stride_w
        inside = inside & (p < P) & (q < Q)
        y_rows = pair_offset(pair, k, y_n, y_j) + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
        y_block = tl.load(
            grad_y + y_rows[:, None] + (o * y_c)[None, :],
            mask=inside[:, None] & c_exists[None, :],
            other=0.0,
        )
        w_cols = weight + branch * w_b + o * w_o + r * w_r + s * w_s
        w_block = tl.load(w_cols, mask=c_exists, other=0.0)
        total += y_block.to(tl.float32) * w_block.to(tl.float32)[None, :]

    x_rows = grad_x + slot.to(tl.int64) * x_slot + m.to(tl.int64) * x_pixel
    tl.store(
        x_rows[:, None] + c[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=(m < image)[:, None] & (c < C)[None, :],
    )


_GRAD_WEIGHT_RUNTIME = [
    "splits",
    "image",
    "Q",
    "H",
    "W",
    "branches",
    "k",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_GRAD_WEIGHT_RUNTIME)
def branch_conv2d_depthwise_grad_weight_kernel(
    grad_y, x, order, offsets, out,
    splits, image, Q, H, W, K, per_group, branches, k,
    y_n, y_j, y_c, y_h, y_w, x_n, x_j, x_c, x_h, x_w,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[split,b,o,r,s] = sum_{n,j,p,q in split} grad_y[n,j,o,p,q] x[n,j,o//A,h,w]

    over the pairs with index[n,j] = b, with h = p * stride_h + r * dil_h - pad_top, and w likewise;
    outside of the image x is zero.
    A program owns COLS channels of one tap and one branch and one share of the branch's pixels.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(K, COLS)
    o = ((program % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    program = program // col_blocks
    tap = program % (R * S)
    program = program // (R * S)
    split = program % splits
    branch = program // splits
    r, s = tap // S, tap % S
    y_cols, x_cols = grad_y + o * y_c, x + (o // per_group) * x_c

    start = tl.load(offsets + branch)
    rows = tl.load(offsets + branch + 1) - start
    if WIDE:
        rows = rows.to(tl.int64)
    rows = rows * image
    first, last = share_of(rows, split, splits, ROWS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(first, last, ROWS):
        m = block + tl.arange(0, ROWS)
        pair = tl.load(order + start + m // image, mask=m < last, other=0)
        pixel = (m % image).to(tl.int32)
        p, q = pixel // Q, pixel % Q
        h, w = p * stride_h - pad_top + r * dil_h, q * stride_w - pad_left + s * dil_w
        inside = (m < last) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask = inside[:, None] & (o < K)[None, :]
        y_rows = pair_offset(pair, k, y_n, y_j) + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
        x_rows = pair_offset(pair, k, x_n, x_j) + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        y_block = tl.load(y_rows[:, None] + y_cols[None, :], mask=mask, other=0.0)
        x_block = tl.load(x_rows[:, None] + x_cols[None, :], mask=mask, other=0.0)
        total += y_block.to(tl.float32) * x_block.to(tl.float32)

    out_rows = (split.to(tl.int64) * branches + branch) * K + o
    tl.store(
        out + out_rows * (R * S) + tap,
        tl.sum(total, axis=0).to(out.dtype.element_ty),
        mask=o < K,
    )


def launch_forward(
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
    """Launches the forward kernel on a y that is not empty; ``precision`` has no say here."""
    del precision  # no tensor cores: products are exact
    K, P, Q = y.shape[2:]
    tile = tile or DEPTHWISE
    w_b, w_o, _, w_r, w_s = weight.stride()
    grid = layer.pairs * blocks(P * Q, tile.rows) * blocks(K, tile.cols)
    branch_conv2d_depthwise_forward_kernel[(grid,)](
        x, weight, bias, index, order, y,
        P * Q, Q, *x.shape[-2:], K, layer.K, layer.branches, layer.k,
        *map_strides(x), w_b, w_o, w_r, w_s, *((0, 0) if bias is None else bias.stride()),
        P * Q * K, K, *layer.window, layer.R, layer.S, relu, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_x: Tensor,
    layer: BranchLayer,
    precision: str,
    tile: Tile | None,
) -> None:
    """Launches the input gradient on a grad_x that is not empty."""
    del precision
    C, H, W = grad_x.shape[-3:]
    terms = layer.k if grad_x.dim() == 4 else 1
    tile = tile or DEPTHWISE
    w_b, w_o, _, w_r, w_s = weight.stride()
    grid = layer.pairs // terms * blocks(H * W, tile.rows) * blocks(C, tile.cols)
    branch_conv2d_depthwise_grad_input_kernel[(grid,)](
        grad_y, weight, index, grad_x,
        H * W, *grad_y.shape[-2:], W, C, layer.K, layer.branches, layer.k, terms,
        *grad_y.stride(), w_b, w_o, w_r, w_s, H * W * C, C,
        *layer.window, layer.R, layer.S, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    plan: Plan,
    out: Tensor,  # [B, O, 1, kh, kw] or [shares, B, O, 1, kh, kw]
    layer: BranchLayer,
    shares: int,
    wide: bool,
    precision: str,
    tile: Tile,
) -> None:
    """Launches the weight gradient, one slice of out a share."""
    del precision
    K, P, Q = grad_y.shape[2:]
    grid = blocks(K, tile.cols) * layer.R * layer.S * shares * layer.branches
    branch_conv2d_depthwise_grad_weight_kernel[(grid,)](
        grad_y, x, plan.order, plan.offsets, out,
        shares, P * Q, Q, *x.shape[-2:], K, layer.K, layer.branches, layer.k,
        *grad_y.stride(), *map_strides(x),
        *layer.window, layer.R, layer.S, wide, tile.rows, tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
