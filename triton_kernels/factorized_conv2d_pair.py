# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""Both convolutions of a pair in one kernel; the map between them stays in registers.

The second convolution reads the middle map ``dil`` pixels apart along its axis, called a here; the
first one has its taps along the other axis, b. A *line* is every ``dil``-th pixel of a row along a:
one of an image's B rows and one rest r on division by ``dil``. A program takes ROWS lines and
walks along all of them at once. At each step it computes one pixel of the middle map for every
line, keeps the last two, and so has all three taps of one result pixel of every line. Nothing is
shifted, whatever the dilation, and nothing is computed twice but the first two pixels of a segment.

Sums are float32, the middle map has the dtype of x. A program owns what it writes, so results
repeat bit for bit. Offsets are 64 bits wide.
"""

import triton
import triton.language as tl
from pyeff.triton_kernels.factorized_conv2d_line import activated, with_vectors

_RUNTIME = ["lines", "segment", "segments", "A", "B", "A_out", "B_out", "pad", "dil"]


@triton.jit(do_not_specialize=_RUNTIME)
def factorized_pair_kernel(
    x, w_first, b_first, w_second, b_second, scale, shift, residual, y,
    lines, segment, segments, A, B, A_out, B_out, C, L, K,
    x_n, x_c, x_b, x_a, v_o, v_i, v_t, w_o, w_i, w_t,
    r_n, r_c, r_b, r_a, y_n, y_b, y_a, pad, dil,
    INNER: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, MIDDLE: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[n,o,b,a] = f(scale[o] (b_second[o] + sum_{l,s} v[n,l,b,a+s*dil-pad] w_second[o,l,s]) + ...)

    with v[n,l,b,a] = g(b_first[l] + sum_{c,t} x[n,c,b+t*dil-pad,a] w_first[l,c,t]), three taps each
    and stride 1; outside of their images x and v are zero. A program owns ``segment`` pixels of
    ROWS lines, all channels of them (MIDDLE >= L, COLS >= K).
    """
    program = tl.program_id(0)
    line = (program // segments) * ROWS + tl.arange(0, ROWS)
    start = (program % segments) * segment
    rest = line % dil
    b = (line // dil) % B_out
    n = (line // dil // B_out).to(tl.int64)
    m = tl.arange(0, MIDDLE)
    o = tl.arange(0, COLS)
    top = b - pad
    x_rows = x + n * x_n + top.to(tl.int64) * x_b
    y_rows = y + n * y_n + b.to(tl.int64) * y_b
    r_rows = n * r_n + b.to(tl.int64) * r_b
    v_cols = w_first + m.to(tl.int64) * v_o
    depth_blocks = tl.cdiv(C, DEPTH)
    before_last = tl.zeros((ROWS, MIDDLE), x.dtype.element_ty)
    last = tl.zeros((ROWS, MIDDLE), x.dtype.element_ty)
    for number in range(start, start + segment + 2):
        a = rest + number * dil - pad
        a_inside = (line < lines) & (a >= 0) & (a < A)
        x_pixels = x_rows + a.to(tl.int64) * x_a
        middle = tl.zeros((ROWS, MIDDLE), tl.float32)
        for step in range(0, 3 * depth_blocks):
            t = step // depth_blocks
            c = (step % depth_blocks) * DEPTH + tl.arange(0, DEPTH)
            inside = a_inside & (top + t * dil >= 0) & (top + t * dil < B)
            x_tap = tl.cast(t * dil, tl.int64) * x_b
            x_block = tl.load(
                (x_pixels + x_tap)[:, None] + (c.to(tl.int64) * x_c)[None, :],
                mask=inside[:, None] & (c < C)[None, :],
                other=0.0,
            )
            v_block = tl.load(
                (v_cols + tl.cast(t, tl.int64) * v_t)[None, :] + (c.to(tl.int64) * v_i)[:, None],
                mask=(c < C)[:, None] & (m < L)[None, :],
                other=0.0,
            )
            middle = tl.dot(x_block, v_block, middle, input_precision=PRECISION)
        middle = activated(with_vectors(middle, b_first, None, None, m, m < L), INNER)
        newest = tl.where(a_inside[:, None], middle, 0.0).to(x.dtype.element_ty)

        if number >= start + 2:
            total = tl.zeros((ROWS, COLS), tl.float32)
            # A loop, so that the weights take shared memory rather than registers; after three
            # rounds the three are what they were.
            for tap in range(0, 3):
                w_tap = tl.load(
                    w_second + tap * w_t + ((m * w_i)[:, None] + (o * w_o)[None, :]),
                    mask=(m < L)[:, None] & (o < K)[None, :],
                    other=0.0,
                )
                total = tl.dot(before_last, w_tap, total, input_precision=PRECISION)
                before_last, last, newest = last, newest, before_last
            total = with_vectors(total, b_second, scale, shift, o, o < K)
            q = rest + (number - 2) * dil
            exists = ((line < lines) & (q < A_out))[:, None] & (o < K)[None, :]
            if residual is not None:
                r_pixels = residual + r_rows + q.to(tl.int64) * r_a
                r_block = r_pixels[:, None] + (o.to(tl.int64) * r_c)[None, :]
                total += tl.load(r_block, mask=exists, other=0.0).to(tl.float32)
            total = activated(total, OUTER).to(y.dtype.element_ty)
            y_pixels = y_rows + q.to(tl.int64) * y_a
            tl.store(y_pixels[:, None] + o[None, :], total, mask=exists)
        before_last = last
        last = newest
