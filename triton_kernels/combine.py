# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""combine on the GPU: the sum of per-branch projections over the chosen branches.

Shapes, with B branches and k routes an image: y ``[N, k, F]``, projection ``[B, O, F]``, out
``[N, O]``. A pair n * k + j is row (n, j) of y, projected by branch ``index[n, j]``. An image has
one row only, so that forward and input gradient read each pair's projection once and gain nothing
from matrix instructions; the projection's gradient sums over the pairs of a branch with them.

The arguments are validated by ``pyeff.ops``. All tensors are read by their strides, products of
float32 are exact, sums are float32 and in a fixed order, without atomics. A route that names no
branch adds nothing and gets zero gradients. Nothing waits for the device; every launcher can be
captured in a CUDA graph once a first call has compiled its kernels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from pyeff.triton_kernels.branch_conv2d_gemm import branch_of, pair_offset
from pyeff.triton_kernels.nested_conv2d_layer import blocks
from pyeff.triton_kernels.tiles import Tile, arithmetic, choose, fit_depth, product_precision
from pyeff.triton_kernels.top_k_routes import Plan, branch_plan
from torch import Tensor

_OP = "combine"
_OUTPUTS, _FEATURES = 32, 64  # of the block of a projection that a program holds


@triton.jit(do_not_specialize=["outputs", "branches", "k"])
def combine_forward_kernel(
    y, projection, bias, index, weight, out,
    outputs, F, branches, k,
    y_n, y_j, y_f, p_b, p_o, p_f, bias_o, weight_n, weight_j,
    OUTPUTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """out[n,o] = bias[o] + sum_j weight[n,j] sum_f projection[index[n,j],o,f] y[n,j,f]

    A program owns OUTPUTS outputs of one image.
    """
    out_blocks = tl.cdiv(outputs, OUTPUTS)
    n = tl.program_id(0) // out_blocks
    o = ((tl.program_id(0) % out_blocks) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    depth_blocks = tl.cdiv(F, FEATURES)
    total = tl.zeros((OUTPUTS, FEATURES), tl.float32)
    for step in range(0, k * depth_blocks):
        pair = n * k + step // depth_blocks
        branch, exists = branch_of(index, pair, branches)
        f = (step % depth_blocks) * FEATURES + tl.arange(0, FEATURES)
        share = tl.load(weight + pair_offset(pair, k, weight_n, weight_j)).to(tl.float32)
        row = tl.load(
            y + pair_offset(pair, k, y_n, y_j) + f.to(tl.int64) * y_f,
            mask=(f < F) & exists,
            other=0.0,
        )
        block = tl.load(
            projection + branch * p_b + (o * p_o)[:, None] + (f.to(tl.int64) * p_f)[None, :],
            mask=((o < outputs) & exists)[:, None] & (f < F)[None, :],
            other=0.0,
        )
        row = row.to(tl.float32) * tl.where(exists, share, 0.0)
        total += block.to(tl.float32) * row[None, :]
    result = tl.sum(total, axis=1)
    if bias is not None:
        result += tl.load(bias + o * bias_o, mask=o < outputs, other=0.0).to(tl.float32)
    tl.store(out + n.to(tl.int64) * outputs + o, result.to(out.dtype.element_ty), mask=o < outputs)


@triton.jit(do_not_specialize=["outputs", "branches", "k", "per_program"])
def combine_grad_input_kernel(
    grad_out, y, projection, index, weight, grad_y, grad_weight,
    outputs, F, branches, k, per_program,
    g_n, g_o, y_n, y_j, y_f, p_b, p_o, p_f, weight_n, weight_j,
    OUTPUTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """grad_y[n,j,f] = weight[n,j] t[f] and grad_weight[n,j] = sum_f y[n,j,f] t[f]

    with t[f] = sum_o projection[index[n,j],o,f] grad_out[n,o]. A program owns ``per_program``
    features of one pair: all of them where the routes' gradient is asked for.
    """
    parts = tl.cdiv(F, per_program)
    pair = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts) * per_program
    branch, exists = branch_of(index, pair, branches)
    share = tl.load(weight + pair_offset(pair, k, weight_n, weight_j)).to(tl.float32)
    share = tl.where(exists, share, 0.0)
    slope = tl.zeros((FEATURES,), tl.float32)
    for start in range(first, tl.minimum(first + per_program, F), FEATURES):
        f = start + tl.arange(0, FEATURES)
        total = tl.zeros((OUTPUTS, FEATURES), tl.float32)
        for out in range(0, outputs, OUTPUTS):
            o = (out + tl.arange(0, OUTPUTS)).to(tl.int64)
            o_exists = (o < outputs) & exists
            grad = tl.load(
                grad_out + (pair // k).to(tl.int64) * g_n + o * g_o, mask=o_exists, other=0.0
            )
            block = tl.load(
                projection + branch * p_b + (o * p_o)[:, None] + (f.to(tl.int64) * p_f)[None, :],
                mask=o_exists[:, None] & (f < F)[None, :],
                other=0.0,
            )
            total += block.to(tl.float32) * grad.to(tl.float32)[:, None]
        product = tl.sum(total, axis=0)
        if grad_y is not None:
            tl.store(
                grad_y + pair.to(tl.int64) * F + f,
                (product * share).to(grad_y.dtype.element_ty),
                mask=f < F,
            )
        if grad_weight is not None:
            row = tl.load(
                y + pair_offset(pair, k, y_n, y_j) + f.to(tl.int64) * y_f,
                mask=(f < F) & exists,
                other=0.0,
            )
            slope += row.to(tl.float32) * product
    if grad_weight is not None:
        tl.store(grad_weight + pair, tl.sum(slope, axis=0).to(grad_weight.dtype.element_ty))


@triton.jit(do_not_specialize=["k"])
def combine_grad_projection_kernel(
    grad_out, y, weight, order, offsets, out,
    outputs, F, k,
    g_n, g_o, y_n, y_j, y_f, weight_n, weight_j,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[b,o,f] = sum_{(n,j) with index[n,j]=b} weight[n,j] grad_out[n,o] y[n,j,f]

    A program owns ROWS outputs by COLS features of one branch and sums over the branch's pairs in
    their order; a branch without pairs gets zeros.
    """
    program = tl.program_id(0)
    col_blocks = tl.cdiv(F, COLS)
    row_blocks = tl.cdiv(outputs, ROWS)
    f = ((program % col_blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    program = program // col_blocks
    o = ((program % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    branch = program // row_blocks
    last = tl.load(offsets + branch + 1)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(tl.load(offsets + branch), last, DEPTH):
        slot = first + tl.arange(0, DEPTH)
        exists = slot < last
        pair = tl.load(order + slot, mask=exists, other=0)
        share = tl.load(weight + pair_offset(pair, k, weight_n, weight_j), mask=exists, other=0.0)
        g_block = tl.load(
            grad_out + ((pair // k).to(tl.int64) * g_n)[:, None] + (o * g_o)[None, :],
            mask=exists[:, None] & (o < outputs)[None, :],
            other=0.0,
        )
        y_block = tl.load(
            y + pair_offset(pair, k, y_n, y_j)[:, None] + (f * y_f)[None, :],
            mask=exists[:, None] & (f < F)[None, :],
            other=0.0,
        )
        g_block = (g_block.to(tl.float32) * share.to(tl.float32)[:, None]).to(y_block.dtype)
        total = tl.dot(tl.trans(g_block), y_block, total, input_precision="ieee")
    out_rows = (branch.to(tl.int64) * outputs + o) * F
    tl.store(
        out + out_rows[:, None] + f[None, :],
        total.to(out.dtype.element_ty),
        mask=(o < outputs)[:, None] & (f < F)[None, :],
    )


def forward(
    y: Tensor,  # [N, k, F]
    projection: Tensor,  # [B, O, F]
    bias: Tensor | None,  # [O]
    index: Tensor,  # [N, k]
    weight: Tensor,  # [N, k]
) -> Tensor:  # [N, O]
    """bias + the sum over j of weight[n, j] * projection[index[n, j]] @ y[n, j].

    Args:
        y: The branches' features, ``[N, k, F]``; float16, bfloat16 or float32.
        projection: ``[B, O, F]``, dtype of ``y``.
        bias: ``[O]``, or None.
        index: The routes' index, int32 ``[N, k]``, contiguous.
        weight: The routes' weight, ``[N, k]``, any of the three dtypes.

    Returns:
        ``[N, O]``, dtype and device of ``y``. Deterministic.

    Raises:
        TypeError: ``y`` is neither float16, bfloat16 nor float32.
    """
    product_precision(_OP, y.dtype, "ieee")
    (N, k, F), (B, outputs, _) = y.shape, projection.shape
    out = torch.empty((N, outputs), dtype=y.dtype, device=y.device)
    if out.numel():
        with torch.cuda.device_of(y):
            combine_forward_kernel[(N * blocks(outputs, _OUTPUTS),)](
                y, projection, bias, index, weight, out, outputs, F, B, k,
                *y.stride(), *projection.stride(), 0 if bias is None else bias.stride(0),
                *weight.stride(), _OUTPUTS, _FEATURES,
            )  # fmt: skip
    return out


def grad_input(
    grad_out: Tensor,  # [N, O]
    y: Tensor,  # [N, k, F]
    projection: Tensor,  # [B, O, F]
    index: Tensor,  # [N, k]
    weight: Tensor,  # [N, k]
    *,
    need_y: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y and of the routes' weight, which share their sums.

    Args:
        grad_out: Gradient of the result, any strides.
        y: As in the forward.
        projection: As in the forward.
        index: As in the forward.
        weight: As in the forward.
        need_y: Whether the gradient of ``y`` is wanted.
        need_weight: Whether the gradient of ``weight`` is wanted.

    Returns:
        ``[N, k, F]`` in the dtype of ``y`` and ``[N, k]`` in that of ``weight``; None for what is
        not wanted. Deterministic.

    Raises:
        TypeError: ``y`` is neither float16, bfloat16 nor float32.
    """
    product_precision(_OP, y.dtype, "ieee")
    (N, k, F), (B, outputs, _) = y.shape, projection.shape
    grad_y = torch.empty((N, k, F), dtype=y.dtype, device=y.device) if need_y else None
    grad_weight = None
    if need_weight:
        grad_weight = torch.empty((N, k), dtype=weight.dtype, device=weight.device)
    if grad_weight is not None and y.shape[2] == 0:
        grad_weight.zero_()  # a sum over no features
    elif y.numel() and (need_y or need_weight):
        per_program = F if need_weight else _FEATURES
        with torch.cuda.device_of(y):
            combine_grad_input_kernel[(N * k * blocks(F, per_program),)](
                grad_out, y, projection, index, weight, grad_y, grad_weight,
                outputs, F, B, k, per_program,
                *grad_out.stride(), *y.stride(), *projection.stride(), *weight.stride(),
                _OUTPUTS, _FEATURES,
            )  # fmt: skip
    return grad_y, grad_weight


def grad_projection(
    grad_out: Tensor,  # [N, O]
    y: Tensor,  # [N, k, F]
    projection_shape: Sequence[int],
    index: Tensor,  # [N, k]
    weight: Tensor,  # [N, k]
    *,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> Tensor:  # [B, O, F]
    """The gradient of the stacked projections, exactly zero for a branch that nobody chose.

    Args:
        grad_out: Gradient of the result, any strides.
        y: As in the forward.
        projection_shape: ``[B, O, F]``.
        index: As in the forward.
        weight: As in the forward.
        plan: The plan of ``index`` as it is now; computed here by default.
        tile: Instead of the table's choice: for tests and tuning.

    Returns:
        ``projection_shape``, contiguous, dtype and device of ``y``. Summed in float32, in the order
        of the pairs: deterministic.

    Raises:
        TypeError: ``y`` is neither float16, bfloat16 nor float32.
    """
    kind = arithmetic(y.dtype, product_precision(_OP, y.dtype, "ieee"))
    B, outputs, F = projection_shape
    grad = torch.empty((B, outputs, F), dtype=y.dtype, device=y.device)
    if y.numel() == 0 or grad.numel() == 0:
        return grad.zero_()
    tile = tile or choose("grad_weight", kind, y.device, outputs, F, B)
    tile = fit_depth(tile, 2 * blocks(index.numel(), B))
    with torch.cuda.device_of(y):
        plan = plan or branch_plan(index, B)
        combine_grad_projection_kernel[(B * blocks(outputs, tile.rows) * blocks(F, tile.cols),)](
            grad_out, y, weight, plan.order, plan.offsets, grad, outputs, F, index.shape[1],
            *grad_out.stride(), *y.stride(), *weight.stride(),
            tile.rows, tile.cols, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return grad
