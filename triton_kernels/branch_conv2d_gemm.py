# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""The kernels of branch_conv2d as implicit GEMM: forward and the three gradients.

Shapes, with B branches, k routes an image and G groups: x ``[N, G * C, H, W]`` or
``[N, k, G * C, H, W]``, weight ``[B, G * K, C, R, S]``, y ``[N, k, G * K, P, Q]``; C and K are the
channels of one group. A pair n * k + j is image n on branch ``index[n, j]``. A block of pixels lies
inside one pair, so that a program has one base pointer for x and one for the weight; neither is
ever copied. Inputs are read by their strides, maps are written with the channels innermost.

A route that names no branch counts as a branch of zeros: nothing is read, zeros are written.
Sums are float32. No atomics: a program owns what it writes, so results repeat bit for bit.
Offsets are 64 bits wide. ``WIDE`` makes the numbers of a branch's pixels 64 bits wide too.
"""

import triton
import triton.language as tl
from pyeff.triton_kernels.nested_conv2d_gemm import first_tap


@triton.jit
def existing_branch(route, branches):
    """The branch that a route names, and whether there is such a branch."""
    exists = (route >= 0) & (route < branches)
    return tl.where(exists, route, 0).to(tl.int64), exists


@triton.jit
def branch_of(index, pair, branches):
    """The branch of a pair, and whether there is such a branch."""
    return existing_branch(tl.load(index + pair), branches)


@triton.jit
def pair_offset(pair, k, stride_n, stride_j):
    """Where a pair lies in a tensor [N, k, ...]; with stride_j = 0, where its image lies."""
    return (pair // k).to(tl.int64) * stride_n + (pair % k).to(tl.int64) * stride_j


_FORWARD_RUNTIME = [
    "image",
    "Q",
    "H",
    "W",
    "groups",
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
def branch_conv2d_forward_kernel(
    x, weight, bias, index, order, y,
    image, Q, H, W, C, K, groups, branches, k,
    x_n, x_j, x_c, x_h, x_w, w_b, w_o, w_i, w_r, w_s, bias_b, bias_o, y_pair, y_pixel,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[n,j,o,p,q] = f(bias[b,o] + sum_{c,r,s} x[n,j,c,h,w] weight[b,o,c,r,s]), b = index[n,j]

    with h = p * stride_h + r * dil_h - pad_top, and w likewise; outside of the image x is zero.
    A program owns ROWS pixels of one pair by COLS channels of one group, and writes them once.
    Pairs are taken in ``order``, so that programs that run together share a branch's weight;
    without it as they come, so that they share an image.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(K, COLS)
    row_blocks = tl.cdiv(image, ROWS)
    o = (program % col_blocks) * COLS + tl.arange(0, COLS)
    program = program // col_blocks
    m = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    program = program // row_blocks
    group = (program % groups).to(tl.int64)
    pair = program // groups
    if order is not None:
        pair = tl.load(order + pair)
    branch, exists = branch_of(index, pair, branches)
    o_exists = (o < K) & exists
    p, q = m // Q, m % Q
    top, left = p * stride_h - pad_top, q * stride_w - pad_left

    x_rows = x + pair_offset(pair, k, x_n, x_j) + group * C * x_c
    x_rows = x_rows + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    w_cols = weight + branch * w_b + (group * K + o) * w_o
    depth_blocks = tl.cdiv(C, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, R * S * depth_blocks):
        tap = step // depth_blocks
        r, s = tap // S, tap % S
        c = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        h, w = top + r * dil_h, left + s * dil_w
        inside = (m < image) & exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_tap = tl.cast(r * dil_h, tl.int64) * x_h + tl.cast(s * dil_w, tl.int64) * x_w
        x_block = tl.load(
            (x_rows + x_tap)[:, None] + (c.to(tl.int64) * x_c)[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        w_tap = tl.cast(r, tl.int64) * w_r + tl.cast(s, tl.int64) * w_s
        w_block = tl.load(
            (w_cols + w_tap)[None, :] + (c.to(tl.int64) * w_i)[:, None],
            mask=(c < C)[:, None] & o_exists[None, :],
            other=0.0,
        )
        total = tl.dot(x_block, w_block, total, input_precision=PRECISION)

    if bias is not None:
        shift = bias + branch * bias_b + (group * K + o) * bias_o
        total += tl.load(shift, mask=o_exists, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_rows = y + pair.to(tl.int64) * y_pair + m.to(tl.int64) * y_pixel
    tl.store(
        y_rows[:, None] + (group * K + o)[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < image)[:, None] & (o < K)[None, :],
    )


_GRAD_INPUT_RUNTIME = [
    "image",
    "cols_w",
    "P",
    "Q",
    "H",
    "W",
    "groups",
    "branches",
    "k",
    "terms",
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
def branch_conv2d_grad_input_kernel(
    grad_y, weight, index, grad_x,
    image, cols_w, P, Q, H, W, C, K, groups, branches, k, terms,
    y_n, y_j, y_c, y_h, y_w, w_b, w_o, w_i, w_r, w_s, x_slot, x_pixel,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    step_h, step_w, jump_h, jump_w,
    R: tl.constexpr, S: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x[slot,c,h,w] = sum_{j,o,r,s} grad_y[n,j,o,p,q] weight[b,o,c,r,s], b = index[n,j]

    over the taps for which p = (h + pad_top - r * dil_h) / stride_h, and q likewise, are whole.
    A slot is an image whose k pairs are summed in order (terms = k), or one pair (terms = 1).
    The pixels of x fall into stride_h * stride_w classes, by their rest on division by the stride,
    or as many as there are pixels where the stride is larger.
    All pixels of a class meet the same taps: every step_h-th from the first, one output row
    jump_h earlier each time. A program owns ROWS pixels of one class of one slot by COLS channels
    of one group; pixels that no tap reaches get zero.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(image, ROWS)
    c = (program % col_blocks) * COLS + tl.arange(0, COLS)
    program = program // col_blocks
    m = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    program = program // row_blocks
    group = (program % groups).to(tl.int64)
    program = program // groups
    classes_w = tl.minimum(stride_w, W)
    classes = tl.minimum(stride_h, H) * classes_w
    rest_h, rest_w = (program % classes) // classes_w, (program % classes) % classes_w
    slot = program // classes
    h, w = rest_h + (m // cols_w) * stride_h, rest_w + (m % cols_w) * stride_w
    m_exists = (m < image) & (h < H) & (w < W)

    first_r = first_tap(rest_h + pad_top, dil_h, stride_h, R)
    first_s = first_tap(rest_w + pad_left, dil_w, stride_w, S)
    taps_r, taps_s = tl.cdiv(R - first_r, step_h), tl.cdiv(S - first_s, step_w)
    p0 = (h + pad_top - first_r * dil_h) // stride_h
    q0 = (w + pad_left - first_s * dil_w) // stride_w
    y_rows = grad_y + group * K * y_c + p0.to(tl.int64) * y_h + q0.to(tl.int64) * y_w
    w_cols = weight + c.to(tl.int64) * w_i + group * K * w_o
    w_cols = w_cols + first_r.to(tl.int64) * w_r + first_s.to(tl.int64) * w_s
    # In registers: a load inside of the loop would take stages from the pipeline of the others.
    t = tl.arange(0, TERMS)
    routes = tl.load(index + slot * terms + t, mask=t < terms, other=-1)
    depth_blocks = tl.cdiv(K, DEPTH)
    steps = taps_r * taps_s * depth_blocks
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, terms * steps):
        pair = slot * terms + step // steps
        route = tl.sum(tl.where(t == step // steps, routes, 0), axis=0)
        branch, exists = existing_branch(route, branches)
        tap = (step % steps) // depth_blocks
        r, s = tap // taps_s, tap % taps_s
        o = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        p, q = p0 - r * jump_h, q0 - s * jump_w
        inside = m_exists & exists & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        y_tap = pair_offset(pair, k, y_n, y_j)
        y_tap -= tl.cast(r * jump_h, tl.int64) * y_h + tl.cast(s * jump_w, tl.int64) * y_w
        y_block = tl.load(
            (y_rows + y_tap)[:, None] + (o.to(tl.int64) * y_c)[None, :],
            mask=inside[:, None] & (o < K)[None, :],
            other=0.0,
        )
        w_tap = branch * w_b
        w_tap += tl.cast(r * step_h, tl.int64) * w_r + tl.cast(s * step_w, tl.int64) * w_s
        w_block = tl.load(
            (w_cols + w_tap)[None, :] + (o.to(tl.int64) * w_o)[:, None],
            mask=((o < K) & exists)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(y_block, w_block, total, input_precision=PRECISION)

    x_rows = grad_x + slot.to(tl.int64) * x_slot + (h.to(tl.int64) * W + w) * x_pixel
    tl.store(
        x_rows[:, None] + (group * C + c)[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=m_exists[:, None] & (c < C)[None, :],
    )


_GRAD_WEIGHT_RUNTIME = [
    "splits",
    "image",
    "Q",
    "H",
    "W",
    "groups",
    "branches",
    "k",
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "dil_h",
    "dil_w",
]


@triton.jit
def share_of(rows, split, splits, DEPTH: tl.constexpr):
    """First and last + 1 of the rows of one share: whole blocks of DEPTH, the last one ragged."""
    per_split = tl.cdiv(tl.cdiv(rows, splits), DEPTH) * DEPTH
    first = split * per_split
    return first, tl.minimum(first + per_split, rows)


@triton.jit(do_not_specialize=_GRAD_WEIGHT_RUNTIME)
def branch_conv2d_grad_weight_kernel(
    grad_y, x, order, offsets, out,
    splits, image, Q, H, W, C, K, groups, branches, k,
    y_n, y_j, y_c, y_h, y_w, x_n, x_j, x_c, x_h, x_w, out_c, out_tap,
    stride_h, stride_w, pad_top, pad_left, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[split,b,o,c,r,s] = sum_{n,j,p,q in split} grad_y[n,j,o,p,q] x[n,j,c,h,w]

    over the pairs with index[n,j] = b, with h = p * stride_h + r * dil_h - pad_top, and w likewise;
    outside of the image x is zero.
    A program owns ROWS output channels by COLS input channels of one tap, group and branch and one
    share of that branch's pixels. The pixels of all pairs of the branch are numbered through, so
    that a small image leaves no block half empty; ``order`` and ``offsets`` say which pair is
    meant. A branch without pairs gets zeros. ``out`` is the gradient itself, or a float32
    workspace with one slice per share.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(K, ROWS)
    c = (program % col_blocks) * COLS + tl.arange(0, COLS)
    program = program // col_blocks
    tap = program % (R * S)
    program = program // (R * S)
    o = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    program = program // row_blocks
    group = (program % groups).to(tl.int64)
    program = program // groups
    split = program % splits
    branch = program // splits
    r, s = tap // S, tap % S
    y_cols = grad_y + (group * K + o) * y_c
    x_cols = x + (group * C + c) * x_c

    start = tl.load(offsets + branch)
    rows = tl.load(offsets + branch + 1) - start
    if WIDE:
        rows = rows.to(tl.int64)
    rows = rows * image
    first, last = share_of(rows, split, splits, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(first, last, DEPTH):
        m = block + tl.arange(0, DEPTH)
        pair = tl.load(order + start + m // image, mask=m < last, other=0)
        pixel = (m % image).to(tl.int32)
        p, q = pixel // Q, pixel % Q
        h, w = p * stride_h - pad_top + r * dil_h, q * stride_w - pad_left + s * dil_w
        inside = (m < last) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        y_rows = pair_offset(pair, k, y_n, y_j) + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
        x_rows = pair_offset(pair, k, x_n, x_j) + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        y_block = tl.load(
            y_rows[:, None] + y_cols[None, :],
            mask=inside[:, None] & (o < K)[None, :],
            other=0.0,
        )
        x_block = tl.load(
            x_rows[:, None] + x_cols[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(y_block), x_block, total, input_precision=PRECISION)

    slice_of_out = split.to(tl.int64) * branches + branch
    out_rows = ((slice_of_out * groups + group) * K + o) * (C * R * S) + tap * out_tap
    tl.store(
        out + out_rows[:, None] + (c * out_c)[None, :],
        total.to(out.dtype.element_ty),
        mask=(o < K)[:, None] & (c < C)[None, :],
    )


@triton.jit(do_not_specialize=["channels"])
def branch_sum_kernel(
    rows, order, offsets, out, channels, row_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """out[b,o] = sum over the pairs of branch b of rows[pair,o], in the order of the pairs.

    A program owns COLS channels of one branch; rows has its channels innermost.
    """
    col_blocks = tl.cdiv(channels, COLS)
    o = (tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)
    branch = tl.program_id(0) // col_blocks
    total = tl.zeros((ROWS, COLS), tl.float32)
    last = tl.load(offsets + branch + 1)
    for first in range(tl.load(offsets + branch), last, ROWS):
        slot = first + tl.arange(0, ROWS)
        pair = tl.load(order + slot, mask=slot < last, other=0).to(tl.int64)
        total += tl.load(
            rows + (pair * row_stride)[:, None] + o[None, :],
            mask=(slot < last)[:, None] & (o < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        out + branch.to(tl.int64) * channels + o,
        tl.sum(total, axis=0).to(out.dtype.element_ty),
        mask=o < channels,
    )
