# mypy: allow-untyped-defs
# A kernel's arguments have no Python types: they are what Triton makes of the call's.
"""top_k_routes on the GPU: which k branches each image takes, and the pairs in branch order.

A pair is one (image, branch) of the routes; pair ``n * k + j`` is image n with branch
``index[n, j]``. The arguments are validated by ``pyeff.ops``; here they only become grids. Nothing
waits for the device, and every launcher can be captured in a CUDA graph once a first call has
compiled its kernels. No atomics: results repeat bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements of a program's block of scores
_PAIRS = 1024  # pairs that a program of the plan reads at once


class Plan(NamedTuple):
    """The pairs ordered by branch, on the device.

    Attributes:
        order: int32 ``[N * k]``; pair numbers by branch, within a branch in their own order.
            Pairs whose route names no branch come last.
        offsets: int32 ``[B + 1]``; the pairs of branch b are
            ``order[offsets[b] : offsets[b + 1]]``.
    """

    order: Tensor
    offsets: Tensor


@triton.jit(do_not_specialize=["N", "B", "k"])
def top_k_routes_kernel(
    scores, index, weight,
    N, B, k, scores_n, scores_b,
    SOFTMAX: tl.constexpr, ROWS: tl.constexpr, BRANCHES: tl.constexpr, ROUTES: tl.constexpr,
):  # fmt: skip
    """index[n, :k] = the branches with the highest scores, of equal scores the lower branch first.

    weight[n, :k] = softmax over the kept scores, or ones. A NaN counts as lower than everything
    else, so that every index names a branch; a softmax over its row gives NaN.
    A program owns ROWS images.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BRANCHES)
    j = tl.arange(0, ROUTES)
    exists = (n < N)[:, None] & (b < B)[None, :]
    score = tl.load(
        scores + (n * scores_n)[:, None] + (b.to(tl.int64) * scores_b)[None, :],
        mask=exists,
        other=0.0,
    )
    if score.dtype != tl.float64:
        score = score.to(tl.float32)
    is_nan = score != score
    left = tl.where(exists, 1, 0)
    # Those that are left compare first, their scores second: -inf is a score like any other.
    ranked = tl.where(exists & (is_nan == 0), score, float("-inf"))
    chosen = tl.zeros((ROWS, ROUTES), tl.int32)
    kept = tl.full((ROWS, ROUTES), float("-inf"), ranked.dtype)
    for step in range(0, k):
        best = tl.max(ranked, axis=1)
        number = tl.where((left != 0) & (is_nan == 0) & (ranked == best[:, None]), b[None, :], B)
        first = tl.min(number, axis=1)
        # Only NaNs are left: in their own order.
        rest = tl.min(tl.where(left != 0, b[None, :], B), axis=1)
        first = tl.where(first < B, first, rest)
        taken = b[None, :] == first[:, None]
        left = tl.where(taken, 0, left)
        ranked = tl.where(taken, float("-inf"), ranked)
        here = j[None, :] == step
        chosen = tl.where(here, first[:, None], chosen)
        kept = tl.where(here, best[:, None], kept)
    out = (n * k)[:, None] + j[None, :]
    mask = (n < N)[:, None] & (j < k)[None, :]
    tl.store(index + out, chosen, mask=mask)
    if SOFTMAX:
        power = tl.exp(kept - tl.max(kept, axis=1)[:, None])
        power = tl.where((j < k)[None, :], power, 0.0)
        share = power / tl.sum(power, axis=1)[:, None]
        nans = tl.max(tl.where(exists & is_nan, 1, 0), axis=1)
        share = tl.where((nans != 0)[:, None], float("nan"), share)
    else:
        share = tl.full((ROWS, ROUTES), 1.0, tl.float32)
    tl.store(weight + out, share.to(weight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "B", "k"])
def top_k_routes_grad_kernel(
    grad_weight, index, weight, grad_scores,
    N, B, k, grad_n, grad_j,
    ROWS: tl.constexpr, BRANCHES: tl.constexpr, ROUTES: tl.constexpr,
):  # fmt: skip
    """grad_scores[n, index[n,j]] = weight[n,j] * (g[n,j] - sum_i weight[n,i] g[n,i]), else zero.

    A program owns ROWS images.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BRANCHES)
    j = tl.arange(0, ROUTES)
    mask = (n < N)[:, None] & (j < k)[None, :]
    routes = (n * k)[:, None] + j[None, :]
    share = tl.load(weight + routes, mask=mask, other=0.0)
    grad = tl.load(
        grad_weight + (n * grad_n)[:, None] + (j.to(tl.int64) * grad_j)[None, :],
        mask=mask,
        other=0.0,
    )
    if share.dtype != tl.float64:
        share, grad = share.to(tl.float32), grad.to(tl.float32)
    slope = share * (grad - tl.sum(share * grad, axis=1)[:, None])
    total = tl.zeros((ROWS, BRANCHES), slope.dtype)
    for step in range(0, k):
        branch = tl.load(index + n * k + step, mask=n < N, other=-1)
        own = tl.sum(tl.where(j[None, :] == step, slope, 0.0), axis=1)
        total += tl.where(branch[:, None] == b[None, :], own[:, None], 0.0)
    tl.store(
        grad_scores + (n * B)[:, None] + b[None, :],
        total.to(grad_scores.dtype.element_ty),
        mask=(n < N)[:, None] & (b < B)[None, :],
    )


@triton.jit(do_not_specialize=["pairs", "B"])
def branch_plan_kernel(index, order, offsets, pairs, B, BLOCK: tl.constexpr):
    """A counting sort of the pairs by branch, stable; a program owns one branch.

    offsets[b] = the number of pairs of lower branches; behind it follow the pairs of b. The last
    program, b = B, owns the pairs that name no branch.
    """
    b = tl.program_id(0)
    lower = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        branch = tl.load(index + pair, mask=pair < pairs, other=-1)
        lower += tl.where((branch >= 0) & (branch < b), 1, 0)
    position = tl.sum(lower, axis=0)
    tl.store(offsets + b, position)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        branch = tl.load(index + pair, mask=pair < pairs, other=0)
        branch = tl.where((branch >= 0) & (branch < B), branch, B)
        mine = tl.where((branch == b) & (pair < pairs), 1, 0)
        tl.store(order + position + tl.cumsum(mine, axis=0) - 1, pair, mask=mine != 0)
        position += tl.sum(mine, axis=0)


def forward(scores: Tensor, k: int, weights: str = "binary") -> tuple[Tensor, Tensor]:
    """The k branches of the highest scores of each image, by falling score.

    Args:
        scores: ``[N, B]``, float16, bfloat16, float32 or float64, any strides.
        k: Routes of an image, 1 to B.
        weights: ``"binary"`` (ones) or ``"softmax"`` (over the kept scores of the image).

    Returns:
        index, int32 ``[N, k]``, of equal scores the lower branch first, and weight, ``[N, k]`` in
        the dtype of ``scores``. A NaN counts as the lowest score, and makes the softmax of its
        image NaN: every index names a branch.
    """
    N, B = scores.shape
    index = torch.empty((N, k), dtype=torch.int32, device=scores.device)
    weight = torch.empty((N, k), dtype=scores.dtype, device=scores.device)
    if N:
        rows, branches, routes = _block(B, k)
        with torch.cuda.device_of(scores):
            top_k_routes_kernel[(triton.cdiv(N, rows),)](
                scores, index, weight, N, B, k, *scores.stride(),
                weights == "softmax", rows, branches, routes,
            )  # fmt: skip
    return index, weight


def grad_scores(grad_weight: Tensor, index: Tensor, weight: Tensor, branches: int) -> Tensor:
    """The gradient of the scores for ``weights="softmax"``; that of ``"binary"`` is zero.

    Args:
        grad_weight: Gradient of the routes' weight, ``[N, k]``, any strides.
        index: The forward's index, int32 ``[N, k]``, contiguous.
        weight: The forward's weight, ``[N, k]``, contiguous.
        branches: B.

    Returns:
        ``[N, B]``, dtype and device of ``weight``; zero for what was not kept.
    """
    N, k = index.shape
    grad = torch.empty((N, branches), dtype=weight.dtype, device=weight.device)
    if N:
        rows, width, routes = _block(branches, k)
        with torch.cuda.device_of(weight):
            top_k_routes_grad_kernel[(triton.cdiv(N, rows),)](
                grad_weight, index, weight, grad, N, branches, k, *grad_weight.stride(),
                rows, width, routes,
            )  # fmt: skip
    return grad


def branch_plan(index: Tensor, branches: int) -> Plan:
    """The pairs of the routes in branch order, computed on the device.

    Args:
        index: int32 ``[N, k]``, contiguous. A route that names no branch is left out.
        branches: B.

    Returns:
        The :class:`Plan`; its sizes depend on shapes only.
    """
    pairs = index.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    offsets = torch.empty(branches + 1, dtype=torch.int32, device=index.device)
    with torch.cuda.device_of(index):
        branch_plan_kernel[(branches + 1,)](index, order, offsets, pairs, branches, _PAIRS)
    return Plan(order, offsets)


def _block(branches: int, k: int) -> tuple[int, int, int]:
    """ROWS, BRANCHES and ROUTES: powers of two."""
    width = triton.next_power_of_2(branches)
    return max(1, _TILE // width), width, triton.next_power_of_2(k)
