"""top_k_routes and the launch plan of its routes on the CUDA kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import _C as native


class LaunchPlan(NamedTuple):
    """The (image, branch) pairs by branch, for kernels that work branch by branch.

    Attributes:
        order: int32 ``[N * k]``, the pairs n * k + j of branch 0, then those of branch 1, ...
        offsets: int32 ``[B + 1]``, where those of each branch begin.
    """

    order: Tensor
    offsets: Tensor


def forward(scores: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """index int32 [N, k] and weight [N, k]; a NaN counts as the lowest score."""
    index = scores.new_empty((scores.shape[0], k), dtype=torch.int32)
    weight = scores.new_empty(index.shape)
    native.top_k_routes_cuda(scores, index, weight, softmax)
    return index, weight


def grad_scores(grad_weight: Tensor, index: Tensor, weight: Tensor, branches: int) -> Tensor:
    """[N, B], zero for the branches that were not kept."""
    grad = weight.new_empty(weight.shape[0], branches)
    native.top_k_routes_grad_cuda(
        grad_weight.contiguous(), index.contiguous(), weight.contiguous(), grad
    )
    return grad


def launch_plan(index: Tensor, branches: int) -> LaunchPlan:
    """The plan of a contiguous int32 index; nothing waits for its values.

    It is made for every call: an index whose memory a CUDA graph refills has no new version.

    Raises:
        NotImplementedError: If there are more branches than fit into a block's shared memory.
    """
    order = index.new_empty(index.numel())
    offsets = index.new_empty(branches + 1)
    native.branch_plan_cuda(index, order, offsets)
    return LaunchPlan(order, offsets)
