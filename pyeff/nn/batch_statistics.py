"""Batch statistics over all processes: on the CPU (gloo), where nn.SyncBatchNorm refuses, and CUDA.

The result is that of one process with the joint batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def is_distributed(group: ProcessGroup | None) -> bool:
    """Whether there is more than one process in ``group`` (``None``: all processes)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class _AllReduceSum(torch.autograd.Function):
    """y = sum of x over the processes; the gradient is summed likewise, as y reaches all losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grads[0].contiguous(), ctx.group), None


def sum_over_processes(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of ``x`` over the processes, on every one of them; differentiable."""
    total: Tensor = _AllReduceSum.apply(x, group)
    return total


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float,
    eps: float,
    group: ProcessGroup | None,
) -> Tensor:
    """Batch norm in training mode with the statistics of all processes' images together.

    Sum, square sum and count of each process are added up in float64 by one differentiable
    all-reduce, so every process has to call this in the same order.

    Args:
        x: ``[N, C, H, W]``, this process's images; N may differ between processes and be 0.
        running_mean, running_var: ``[C]``, updated in place, or ``None``.
        weight, bias: ``[C]`` or ``None``.
        factor: weight of the new statistics in the running ones.
        eps: added to the variance.
        group: the processes; ``None`` for all.

    Returns:
        ``[N, C, H, W]`` in x's dtype.

    Raises:
        ValueError: fewer than two values per channel in all processes together.
    """
    channels, values = x.shape[1], x.numel() // x.shape[1]
    wide = x if x.dtype == torch.float64 else x.float()
    if values:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    else:
        mean = wide.sum((0, 2, 3))
        var = mean
    mean, var = mean.double(), var.double()
    count = mean.new_full((1,), float(values))
    local = torch.cat([mean * values, (var + mean * mean) * values, count])
    total = _AllReduceSum.apply(local, group)
    count = total[-1].detach()
    if count < 2:
        raise ValueError(
            "synchronised_batch_norm: x must hold more than one value per channel over all "
            f"processes in training mode, got {int(count)}"
        )
    mean = total[:channels] / count
    var = (total[channels : 2 * channels] / count - mean * mean).clamp_min(0)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), factor)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), factor)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, channels, 1, 1)
    out = wide * scale.to(wide.dtype).view(shape) + shift.to(wide.dtype).view(shape)
    return out.to(x.dtype)
