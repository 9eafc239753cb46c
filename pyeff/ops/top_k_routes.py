"""Which k of the branches every image takes."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyeff.ops._branch_index import remember_valid
from pyeff.ops._branch_routes_op import OP, SoftmaxRoutes, forward, forward_op, refuse_nan
from pyeff.ops._dispatch import forced_backend
from pyeff.ops._eager import is_plain, needs_composition
from pyeff.reference.top_k_routes import top_k_routes as reference


class Routes(NamedTuple):
    """Which branches every image takes, and how much each of them counts.

    Attributes:
        index: Branch numbers, int32 ``[N, k]``.
        weight: ``[N, k]``; :func:`pyeff.ops.combine` multiplies by it.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of routes
    weight: Tensor


def top_k_routes(
    scores: Tensor,
    k: int,
    *,
    weights: Literal["binary", "softmax"] = "binary",
    validate: bool = False,
) -> Routes:
    r"""Keeps the k highest scores of every image.

    Args:
        scores: One for each image and branch, ``[N, B]``, floating point.
        k: How many branches an image takes, from 1 to B.
        weights: "binary" (every kept branch counts 1, and no gradient reaches the scores) or
            "softmax" (:math:`\mathrm{softmax}` over the kept scores, differentiable).
        validate: Also looks for NaN on a GPU, which synchronises. On the CPU that is always done.

    Returns:
        Routes, by falling score, ties to the lower branch number: ``index`` int32 ``[N, k]`` and
        ``weight`` ``[N, k]`` in the dtype of ``scores``.

    Raises:
        ValueError: If ``scores`` is not ``[N, B]``, holds a NaN, or has fewer than k branches.
        TypeError: If ``scores`` is no floating-point tensor or k no int.

    ``weight`` is twice differentiable in ``scores``. Deterministic.

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
    Inference", CVPR 2018 (binary weights); Shazeer et al., "Outrageously Large Neural Networks",
    ICLR 2017 (softmax over the kept scores).

    Example:
        >>> routes = top_k_routes(torch.tensor([[0.1, 0.7, 0.2]]), k=2)
        >>> routes.index.tolist(), routes.weight.tolist()
        ([[1, 2]], [[1.0, 1.0]])
    """
    _check(scores, k, weights)
    softmax = weights == "softmax"
    if not is_plain(scores, scores, None):
        if needs_composition():
            return Routes(*reference(scores, k, weights=weights))
        return Routes(*forward_op(scores, k, softmax))
    if validate and scores.is_cuda:
        refuse_nan(scores)
    if softmax and scores.requires_grad and torch.is_grad_enabled():
        if forced_backend() == "reference":  # autograd differentiates it
            index, weight = forward(scores, k, softmax)
        else:
            index, weight = SoftmaxRoutes.apply(scores, k)
    else:
        index, weight = forward(scores.detach(), k, softmax)
    remember_valid(index, scores.shape[1])
    return Routes(index, weight)


def _check(scores: object, k: object, weights: object) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{OP}: scores must be a tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"{OP}: scores must be a floating-point tensor, got {scores.dtype}")
    if scores.dim() != 2:
        raise ValueError(f"{OP}: scores must be [N, B], got {list(scores.shape)}")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{OP}: k must be an int, got {k!r}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"{OP}: k must be from 1 to the number of branches, {scores.shape[1]}, got {k}"
        )
    if weights not in ("binary", "softmax"):
        raise ValueError(f'{OP}: weights must be "binary" or "softmax", got {weights!r}')
