# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""The kernels of nested_conv2d as implicit GEMM: forward, input gradient, weight gradient.

Shapes, with O, I the channels of the full layer, G its groups, g the active ones:
x ``[N, g * C, H, W]``, weight ``[O, I / G, R, S]``, y ``[N, g * K, P, Q]``; C and K are the
selected channels of one active group. Every tensor is read and written by its strides: neither x
nor weight is ever copied. With the channels innermost (channels_last, the weight too) the loads
are coalesced; other layouts are correct and slower.

Sums are float32. No atomics: a program owns what it writes, so results repeat bit for bit.
Offsets are 64 bits wide. ``WIDE`` makes pixel numbers 64 bits wide too, for 2**31 and more pixels.
"""

import triton
import triton.language as tl


@triton.jit
def full_channels(local, count, lo, index, full):
    """The full layer's numbers of the selected channels ``local``, and which of them exist.

    An index that points outside of the layer counts as a missing channel: nothing is read there.
    """
    exists = local < count
    if index is None:
        channels = (lo + local).to(tl.int64)
    else:
        channels = tl.load(index + local, mask=exists, other=0)
        exists = exists & (channels >= 0) & (channels < full)
    return channels, exists


@triton.jit
def split_pixels(pixels, image, width):
    """(image, row, column) of pixel numbers; an image has ``image`` pixels, ``width`` a row."""
    in_image = pixels % image
    return pixels // image, in_image // width, in_image % width


@triton.jit
def first_tap(position, dilation, stride, TAPS: tl.constexpr):
    """The first tap that falls on the stride's lattice from ``position``; ``TAPS`` if none does."""
    first = tl.full([], TAPS, tl.int32)
    for back in range(1, TAPS + 1):
        tap = TAPS - back
        first = tl.where((position - tap * dilation) % stride == 0, tap, first)
    return first


_FORWARD_RUNTIME = [
    "pixels",
    "image",
    "P",
    "Q",
    "H",
    "W",
    "out_lo",
    "full_in",
    "full_out",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit(do_not_specialize=_FORWARD_RUNTIME)
def nested_conv2d_forward_kernel(
    x, weight, bias, in_index, out_index, y,
    pixels, image, P, Q, H, W, C, K,
    in_lo, out_lo, full_in, full_out,
    x_n, x_c, x_h, x_w, w_o, w_i, w_r, w_s, bias_o, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[n,k,p,q] = f(bias[o(k)] + sum_{c,r,s} x[n,c,h,w] weight[o(k),i(c),r,s])

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns ROWS pixels of y by COLS channels of one group, and writes them once.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(K, COLS)
    blocks = tl.cdiv(pixels, ROWS) * col_blocks
    group = (program // blocks).to(tl.int64)
    block = program % blocks
    row_block = block // col_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, p, q = split_pixels(m, image, Q)
    top, left = p * stride_h - pad_top, q * stride_w - pad_left
    k = (block % col_blocks) * COLS + tl.arange(0, COLS)
    o, k_exists = full_channels(group * K + k, (group + 1) * K, out_lo, out_index, full_out)

    x_rows = x + n.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x_rows += group * C * x_c
    w_cols = weight + o * w_o
    depth_blocks = tl.cdiv(C, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, R * S * depth_blocks):
        tap = step // depth_blocks
        r, s = tap // S, tap % S
        c = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        i, c_exists = full_channels(c, C, in_lo, in_index, full_in)
        h, w = top + r * dil_h, left + s * dil_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_tap = tl.cast(r * dil_h, tl.int64) * x_h + tl.cast(s * dil_w, tl.int64) * x_w
        x_block = tl.load(
            (x_rows + x_tap)[:, None] + (c.to(tl.int64) * x_c)[None, :],
            mask=inside[:, None] & c_exists[None, :],
            other=0.0,
        )
        w_tap = tl.cast(r, tl.int64) * w_r + tl.cast(s, tl.int64) * w_s
        w_block = tl.load(
            (w_cols + w_tap)[None, :] + (i * w_i)[:, None],
            mask=c_exists[:, None] & k_exists[None, :],
            other=0.0,
        )
        total = tl.dot(x_block, w_block, total, input_precision=PRECISION)

    if bias is not None:
        total += tl.load(bias + o * bias_o, mask=k_exists, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_rows = y + n.to(tl.int64) * y_n + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
    tl.store(
        y_rows[:, None] + ((group * K + k) * y_c)[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < pixels)[:, None] & (k < K)[None, :],
    )


_GRAD_INPUT_RUNTIME = [
    "pixels",
    "image",
    "cols_w",
    "P",
    "Q",
    "H",
    "W",
    "out_lo",
    "full_in",
    "full_out",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
    "step_h",
    "step_w",
    "jump_h",
    "jump_w",
]


@triton.jit(do_not_specialize=_GRAD_INPUT_RUNTIME)
def nested_conv2d_grad_input_kernel(
    grad_y, weight, in_index, out_index, grad_x,
    pixels, image, cols_w, P, Q, H, W, C, K,
    in_lo, out_lo, full_in, full_out,
    y_n, y_c, y_h, y_w, w_o, w_i, w_r, w_s, x_n, x_c, x_h, x_w,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    step_h, step_w, jump_h, jump_w,
    R: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x[n,c,h,w] = sum_{k,r,s} grad_y[n,k,p,q] weight[o(k),i(c),r,s]

    over the taps for which p = (h + pad_top - r * dil_h) / stride_h, and q likewise, are whole.
    The pixels of x fall into stride_h * stride_w classes, by their rest on division by the stride,
    or as many as there are pixels where the stride is larger.
    All pixels of a class meet the same taps: every step_h-th from the first, one output row
    jump_h earlier each time. A program owns ROWS pixels of one class by COLS channels of one group;
    pixels that no tap reaches get zero.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(pixels, ROWS)
    block = program % (row_blocks * col_blocks)
    outer = program // (row_blocks * col_blocks)
    classes_w = tl.minimum(stride_w, W)
    classes = tl.minimum(stride_h, H) * classes_w
    group = (outer // classes).to(tl.int64)
    rest_h, rest_w = (outer % classes) // classes_w, (outer % classes) % classes_w
    row_block = block // col_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, class_h, class_w = split_pixels(m, image, cols_w)
    h, w = rest_h + class_h * stride_h, rest_w + class_w * stride_w
    m_exists = (m < pixels) & (h < H) & (w < W)
    c = (block % col_blocks) * COLS + tl.arange(0, COLS)
    i, c_exists = full_channels(c, C, in_lo, in_index, full_in)

    first_r = first_tap(rest_h + pad_top, dil_h, stride_h, R)
    first_s = first_tap(rest_w + pad_left, dil_w, stride_w, S)
    taps_r, taps_s = tl.cdiv(R - first_r, step_h), tl.cdiv(S - first_s, step_w)
    p0 = (h + pad_top - first_r * dil_h) // stride_h
    q0 = (w + pad_left - first_s * dil_w) // stride_w
    y_rows = grad_y + n.to(tl.int64) * y_n + p0.to(tl.int64) * y_h + q0.to(tl.int64) * y_w
    y_rows += group * K * y_c
    w_cols = weight + i * w_i + first_r.to(tl.int64) * w_r + first_s.to(tl.int64) * w_s
    depth_blocks = tl.cdiv(K, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, taps_r * taps_s * depth_blocks):
        tap = step // depth_blocks
        r, s = tap // taps_s, tap % taps_s
        k = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        o, k_exists = full_channels(group * K + k, (group + 1) * K, out_lo, out_index, full_out)
        p, q = p0 - r * jump_h, q0 - s * jump_w
        inside = m_exists & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        y_tap = tl.cast(r * jump_h, tl.int64) * y_h + tl.cast(s * jump_w, tl.int64) * y_w
        y_block = tl.load(
            (y_rows - y_tap)[:, None] + (k.to(tl.int64) * y_c)[None, :],
            mask=inside[:, None] & k_exists[None, :],
            other=0.0,
        )
        w_tap = tl.cast(r * step_h, tl.int64) * w_r + tl.cast(s * step_w, tl.int64) * w_s
        w_block = tl.load(
            (w_cols + w_tap)[None, :] + (o * w_o)[:, None],
            mask=k_exists[:, None] & c_exists[None, :],
            other=0.0,
        )
        total = tl.dot(y_block, w_block, total, input_precision=PRECISION)

    x_rows = grad_x + n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    tl.store(
        x_rows[:, None] + ((group * C + c) * x_c)[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=m_exists[:, None] & (c < C)[None, :],
    )


_GRAD_WEIGHT_RUNTIME = [
    "pixels",
    "per_split",
    "image",
    "Q",
    "H",
    "W",
    "in_lo",
    "out_lo",
    "full_in",
    "full_out",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
    "splits",
]


@triton.jit(do_not_specialize=_GRAD_WEIGHT_RUNTIME)
def nested_conv2d_grad_weight_kernel(
    grad_y, x, in_index, out_index, out,
    pixels, per_split, splits, image, Q, H, W, C, K,
    in_lo, out_lo, full_in, full_out,
    y_n, y_c, y_h, y_w, x_n, x_c, x_h, x_w, out_split, out_o, out_i, out_r, out_s,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[split,o(k),i(c),r,s] = sum_{n,p,q in split} grad_y[n,k,p,q] x[n,c,h,w]

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns ROWS output channels by COLS input channels of one tap, one group and one share
    of the pixels. ``out`` is the gradient itself, or a float32 workspace with one slice per share.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(K, ROWS)
    c = (program % col_blocks) * COLS + tl.arange(0, COLS)
    program = program // col_blocks
    tap = program % (R * S)
    program = program // (R * S)
    k = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    program = program // row_blocks
    split = program % splits
    group = (program // splits).to(tl.int64)
    if WIDE:
        split = split.to(tl.int64)
    r, s = tap // S, tap % S
    y_cols = grad_y + (group * K + k) * y_c
    x_cols = x + (group * C + c) * x_c

    total = tl.zeros((ROWS, COLS), tl.float32)
    start = split * per_split
    for first in range(start, tl.minimum(start + per_split, pixels), DEPTH):
        m = first + tl.arange(0, DEPTH)
        n, p, q = split_pixels(m, image, Q)
        h, w = p * stride_h - pad_top + r * dil_h, q * stride_w - pad_left + s * dil_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        n = n.to(tl.int64)
        y_rows = n * y_n + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
        x_rows = n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        y_block = tl.load(
            y_rows[:, None] + y_cols[None, :],
            mask=inside[:, None] & (k < K)[None, :],
            other=0.0,
        )
        x_block = tl.load(
            x_rows[:, None] + x_cols[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(y_block), x_block, total, input_precision=PRECISION)

    o, k_exists = full_channels(group * K + k, (group + 1) * K, out_lo, out_index, full_out)
    i, c_exists = full_channels(c, C, in_lo, in_index, full_in)
    out += split.to(tl.int64) * out_split + r * out_r + s * out_s
    tl.store(
        out + (o * out_o)[:, None] + (i * out_i)[None, :],
        total.to(out.dtype.element_ty),
        mask=k_exists[:, None] & c_exists[None, :],
    )


_REDUCE_RUNTIME = ["splits", "count", "K", "in_lo", "out_lo", "full_in", "full_out"]


@triton.jit(do_not_specialize=_REDUCE_RUNTIME)
def nested_conv2d_reduce_kernel(
    workspace, in_index, out_index, out,
    splits, count, K, C,
    in_lo, out_lo, full_in, full_out,
    out_o, out_i, out_r, out_s,
    R: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[o(k),i(c),r,s] = sum_split workspace[split,k,r,s,c], in the order of the shares.

    A program owns BLOCK consecutive elements of one slice; workspace is contiguous, ``count``
    elements a slice.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = element < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        part = workspace + tl.cast(split, tl.int64) * count
        total += tl.load(part + element, mask=exists, other=0.0)
    c = element % C
    tap = (element // C) % (R * S)
    o, o_exists = full_channels(element // (R * S * C), K, out_lo, out_index, full_out)
    i, i_exists = full_channels(c, C, in_lo, in_index, full_in)
    tl.store(
        out + o * out_o + i * out_i + (tap // S) * out_r + (tap % S) * out_s,
        total.to(out.dtype.element_ty),
        mask=exists & o_exists & i_exists,
    )
