# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""One 1-D convolution of a pair as implicit GEMM, with everything that follows it.

Shapes: x ``[N, C, H, W]``, weight ``[K, C, TAPS]``, y ``[N, K, P, Q]``. ``VERTICAL`` says which
axis the taps lie on; the other one is left as it is. Inputs are read by their strides, maps are
written with the channels innermost, vectors are contiguous.

Sums are float32. No atomics: a program owns what it writes, so results repeat bit for bit.
Offsets are 64 bits wide. ``WIDE`` makes pixel numbers 64 bits wide too, for 2**31 and more pixels.
"""

import triton
import triton.language as tl
from pyeff.triton_kernels.nested_conv2d_gemm import first_tap, split_pixels


@triton.jit
def activated(t, ACTIVATION: tl.constexpr):
    """The activation of that name; a NaN stays one."""
    if ACTIVATION == "relu":
        t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
        t = tl.minimum(t, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        t = t * tl.sigmoid(t)
    elif ACTIVATION == "hardswish":
        gate = tl.maximum(t + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        t = t * tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    return t


@triton.jit
def through_activation(grad, at, ACTIVATION: tl.constexpr):
    """grad times the activation's derivative at ``at``; of relu and relu6 also at their result."""
    if ACTIVATION == "relu":
        grad = tl.where(at <= 0.0, 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((at <= 0.0) | (at >= 6.0), 0.0, grad)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(at)
        grad = grad * s * (1.0 + at * (1.0 - s))
    elif ACTIVATION == "hardswish":
        inner = grad * (at * (1.0 / 3.0) + 0.5)
        grad = tl.where(at <= -3.0, 0.0, tl.where(at < 3.0, inner, grad))
    return grad


@triton.jit
def with_vectors(total, bias, scale, shift, o, exists):
    """scale * (total + bias) + shift for the columns o; each of the vectors may be None."""
    if bias is not None:
        total += tl.load(bias + o, mask=exists, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        total *= tl.load(scale + o, mask=exists, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        total += tl.load(shift + o, mask=exists, other=0.0).to(tl.float32)[None, :]
    return total


_FORWARD_RUNTIME = ["pixels", "image", "Q", "H", "W", "stride", "pad", "dil"]


@triton.jit(do_not_specialize=_FORWARD_RUNTIME)
def factorized_line_forward_kernel(
    x, weight, bias, scale, shift, residual, y,
    pixels, image, Q, H, W, C, K,
    x_n, x_c, x_h, x_w, w_o, w_i, w_t, r_n, r_c, r_h, r_w, stride, pad, dil,
    TAPS: tl.constexpr, VERTICAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[n,o,p,q] = f(scale[o] (bias[o] + sum_{c,t} x[n,c,h,w] weight[o,c,t]) + shift[o] + r)

    with h = p * stride - pad + t * dil and w = q where it is vertical, else h = p and w likewise;
    r = residual[n,o,p,q]; outside of the image x is zero. A program owns ROWS pixels of y by COLS
    channels, and writes them once.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(K, COLS)
    row_block = program // col_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, p, q = split_pixels(m, image, Q)
    o = (program % col_blocks) * COLS + tl.arange(0, COLS)
    o_exists = o < K
    top, left = p, q
    if VERTICAL:
        top = p * stride - pad
    else:
        left = q * stride - pad

    x_rows = x + n.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    w_cols = weight + o.to(tl.int64) * w_o
    depth_blocks = tl.cdiv(C, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, TAPS * depth_blocks):
        t = step // depth_blocks
        c = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        if VERTICAL:
            inside = (m < pixels) & (top + t * dil >= 0) & (top + t * dil < H)
            x_tap = tl.cast(t * dil, tl.int64) * x_h
        else:
            inside = (m < pixels) & (left + t * dil >= 0) & (left + t * dil < W)
            x_tap = tl.cast(t * dil, tl.int64) * x_w
        x_block = tl.load(
            (x_rows + x_tap)[:, None] + (c.to(tl.int64) * x_c)[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        w_block = tl.load(
            (w_cols + tl.cast(t, tl.int64) * w_t)[None, :] + (c.to(tl.int64) * w_i)[:, None],
            mask=(c < C)[:, None] & o_exists[None, :],
            other=0.0,
        )
        total = tl.dot(x_block, w_block, total, input_precision=PRECISION)

    total = with_vectors(total, bias, scale, shift, o, o_exists)
    exists = (m < pixels)[:, None] & o_exists[None, :]
    if residual is not None:
        r_rows = n.to(tl.int64) * r_n + p.to(tl.int64) * r_h + q.to(tl.int64) * r_w
        r_block = residual + r_rows[:, None] + (o.to(tl.int64) * r_c)[None, :]
        total += tl.load(r_block, mask=exists, other=0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    y_rows = y + m.to(tl.int64) * K
    tl.store(y_rows[:, None] + o[None, :], total.to(y.dtype.element_ty), mask=exists)


_GRAD_INPUT_RUNTIME = [
    "pixels",
    "image",
    "cols_w",
    "P",
    "Q",
    "H",
    "W",
    "stride",
    "pad",
    "dil",
    "step",
    "jump",
]


@triton.jit(do_not_specialize=_GRAD_INPUT_RUNTIME)
def factorized_line_grad_input_kernel(
    grad_y, weight, at, grad_x,
    pixels, image, cols_w, P, Q, H, W, C, K,
    y_n, y_c, y_h, y_w, w_o, w_i, w_t, at_n, at_c, at_h, at_w, stride, pad, dil, step, jump,
    TAPS: tl.constexpr, VERTICAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x[n,c,h,w] = f'(at[n,c,h,w]) sum_{o,t} grad_y[n,o,p,q] weight[o,c,t]

    over the taps for which p = (h + pad - t * dil) / stride is whole, q = w, where it is vertical;
    else p = h and q likewise. The pixels of x fall into ``stride`` classes along the taps' axis, by
    their rest on division by the stride: all of a class meet the same taps, every ``step``-th from
    the first, one output pixel ``jump`` earlier each time. A program owns ROWS pixels of one class
    by COLS channels; pixels that no tap reaches get zero.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, COLS)
    row_blocks = tl.cdiv(pixels, ROWS)
    c = (program % col_blocks) * COLS + tl.arange(0, COLS)
    program = program // col_blocks
    rest = program // row_blocks
    row_block = program % row_blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
    m = row_block * ROWS + tl.arange(0, ROWS)
    n, h, w = split_pixels(m, image, cols_w)
    first = first_tap(rest + pad, dil, stride, TAPS)
    if VERTICAL:
        h = rest + h * stride
        p0, q0 = (h + pad - first * dil) // stride, w
    else:
        w = rest + w * stride
        p0, q0 = h, (w + pad - first * dil) // stride
    m_exists = (m < pixels) & (h < H) & (w < W)

    y_rows = grad_y + n.to(tl.int64) * y_n + p0.to(tl.int64) * y_h + q0.to(tl.int64) * y_w
    w_cols = weight + c.to(tl.int64) * w_i + first.to(tl.int64) * w_t
    depth_blocks = tl.cdiv(K, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for number in range(0, tl.cdiv(TAPS - first, step) * depth_blocks):
        t = number // depth_blocks
        o = (number % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
        if VERTICAL:
            inside = m_exists & (p0 - t * jump >= 0) & (p0 - t * jump < P)
            y_tap = tl.cast(t * jump, tl.int64) * y_h
        else:
            inside = m_exists & (q0 - t * jump >= 0) & (q0 - t * jump < Q)
            y_tap = tl.cast(t * jump, tl.int64) * y_w
        y_block = tl.load(
            (y_rows - y_tap)[:, None] + (o.to(tl.int64) * y_c)[None, :],
            mask=inside[:, None] & (o < K)[None, :],
            other=0.0,
        )
        w_tap = tl.cast(t * step, tl.int64) * w_t
        w_block = tl.load(
            (w_cols + w_tap)[None, :] + (o.to(tl.int64) * w_o)[:, None],
            mask=(o < K)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(y_block, w_block, total, input_precision=PRECISION)

    exists = m_exists[:, None] & (c < C)[None, :]
    if at is not None:
        at_rows = n.to(tl.int64) * at_n + h.to(tl.int64) * at_h + w.to(tl.int64) * at_w
        at_block = at + at_rows[:, None] + (c.to(tl.int64) * at_c)[None, :]
        at_block = tl.load(at_block, mask=exists, other=0.0).to(tl.float32)
        total = through_activation(total, at_block, ACTIVATION)
    x_rows = grad_x + ((n.to(tl.int64) * H + h) * W + w) * C
    tl.store(x_rows[:, None] + c[None, :], total.to(grad_x.dtype.element_ty), mask=exists)
