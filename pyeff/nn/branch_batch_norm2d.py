"""Batch norm for branches: every branch has the statistics of the images that are routed to it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pyeff.nn.batch_statistics import is_distributed, sum_over_processes
from pyeff.ops._branch_index import kernel_index
from pyeff.ops.top_k_routes import Routes


class BranchBatchNorm2d(nn.Module):
    """B batch norms side by side, each over the (image, branch) pairs routed to it.

    Statistics and affine part are stacked, ``[B, C]``. In training a branch's mean and variance
    are those of its own pairs only. A branch with fewer than two values per channel keeps its
    running statistics as they are, and such a pair is normalised by them (without running
    statistics: by itself, so it gives the bias); so 0 or 1 routed images are safe. No loop over
    branches or images, no synchronisation with the host; deterministic; twice differentiable.

    Args:
        channels: channels C.
        branches: number of branches B.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; ``None`` for a cumulative
            average.
        affine: whether there is a scale and shift, per branch.
        track_running_stats: whether there are running statistics; without, every batch is
            normalised by its own.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> norm = BranchBatchNorm2d(4, branches=5)
        >>> routes = pyeff.ops.top_k_routes(torch.randn(2, 5), k=3)
        >>> norm(torch.randn(2, 3, 4, 6, 6), routes).shape
        torch.Size([2, 3, 4, 6, 6])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # None without running statistics
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        branches: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(channels, branches) < 1:
            raise ValueError(
                "BranchBatchNorm2d: channels and branches must be positive, "
                f"got {channels} and {branches}"
            )
        self.channels, self.branches = channels, branches
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.synchronised = False
        self.process_group: ProcessGroup | None = None
        shape = (branches, channels)
        for name in ("weight", "bias"):
            empty = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, empty)
        for name in ("running_mean", "running_var"):
            buffer = torch.empty(shape, device=device, dtype=dtype)
            self.register_buffer(name, buffer if track_running_stats else None)
        count = torch.empty(branches, dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", count if track_running_stats else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets all statistics: mean 0, variance 1, no batches seen."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forgets the statistics and sets every scale to 1 and every shift to 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the next call normalises by the batch's own statistics."""
        return self.training or not self.track_running_stats

    def forward(self, x: Tensor, routes: Routes | Tensor) -> Tensor:
        """Normalises every (image, branch) pair as its branch does.

        Args:
            x: ``[N, C, H, W]``, or one map for every pair, ``[N, k, C, H, W]``.
            routes: which branches: ``Routes``, or their index ``[N, k]``.

        Returns:
            ``[N, k, C, H, W]`` in x's dtype.

        Raises:
            ValueError: x of another shape, a branch that does not exist (as for the operators).
        """
        index = routes.index if isinstance(routes, Routes) else routes
        self._check(x, index)
        if not torch.compiler.is_compiling():
            index = kernel_index("BranchBatchNorm2d", index, self.branches)
        n, k = index.shape
        if x.dim() == 4:
            x = x.unsqueeze(1).expand(n, k, *x.shape[1:])
        # Not reshape: of a stride-0 expansion it keeps the order of dimensions in memory.
        rows = x.flatten(0, 1)
        branch = index.reshape(-1).long()
        with torch.autocast(x.device.type, enabled=False):
            if self.uses_batch_statistics:
                y = self._normalise_batch(rows, branch)
            else:
                y = self._normalise_running(rows, branch)
        return y.unflatten(0, (n, k))

    def _check(self, x: Tensor, index: Tensor) -> None:
        if x.dim() not in (4, 5) or x.shape[-3] != self.channels:
            raise ValueError(
                f"BranchBatchNorm2d: x must be [N, {self.channels}, H, W] or "
                f"[N, k, {self.channels}, H, W], got {list(x.shape)}"
            )
        if index.dim() != 2 or index.shape[0] != x.shape[0]:
            raise ValueError(
                f"BranchBatchNorm2d: routes.index must be [{x.shape[0]}, k] for "
                f"{x.shape[0]} images, got {list(index.shape)}"
            )
        if x.dim() == 5 and x.shape[1] != index.shape[1]:
            raise ValueError(
                f"BranchBatchNorm2d: routes.index must have the k of x, {x.shape[1]}, "
                f"got {index.shape[1]}"
            )

    def _normalise_running(self, x: Tensor, branch: Tensor) -> Tensor:
        """x ``[R, C, H, W]`` by the running statistics of ``branch`` ``[R]``."""
        mean, var = self.running_mean, self.running_var
        inverse = torch.rsqrt(var + self.eps)
        return _affine(x, branch, mean, inverse, self.weight, self.bias)

    def _normalise_batch(self, x: Tensor, branch: Tensor) -> Tensor:
        """x ``[R, C, H, W]`` by the statistics of each branch's own rows; updates the running."""
        wide = torch.promote_types(x.dtype, torch.float32)
        members = (branch == torch.arange(self.branches, device=x.device).unsqueeze(1)).to(wide)
        if self.synchronised and is_distributed(self.process_group):
            count, mean, var = _moments_of_all(x, members, self.process_group)
            self._update(count, mean.detach(), var.detach())
            mean, inverse = self._or_running(count, mean, var)
            return _affine(x, branch, mean, inverse, self.weight, self.bias)
        with torch.no_grad():
            count, mean, var = _moments(x, branch, members)
            self._update(count, mean, var)
            mean, inverse = self._or_running(count, mean, var)
        from_x = (count >= 2) | (not self.track_running_stats)
        share = torch.where(from_x, 1 / count.clamp_min(1), 0)
        y: Tensor = _BatchNorm.apply(
            x, self.weight, self.bias, branch, members, mean, inverse, share, self.eps
        )
        return y

    def _or_running(self, count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / deviation: the running ones for branches with fewer than two values."""
        if self.track_running_stats:
            known = (count >= 2).unsqueeze(1)
            mean = torch.where(known, mean, self.running_mean.to(mean.dtype))
            var = torch.where(known, var, self.running_var.to(var.dtype))
        return mean, torch.rsqrt(var + self.eps)

    @torch.no_grad()
    def _update(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics of the branches with at least two values."""
        if not self.track_running_stats:
            return
        dtype = self.running_mean.dtype
        known = (count >= 2).to(dtype)
        self.num_batches_tracked += known.to(torch.int64)
        batches = self.num_batches_tracked.clamp_min(1)
        factor = known * self.momentum if self.momentum is not None else known / batches
        factor = factor.unsqueeze(1)
        unbiased = var * (count / (count - 1).clamp_min(1)).unsqueeze(1)
        self.running_mean.lerp_(mean.to(dtype), factor)
        self.running_var.lerp_(unbiased.to(dtype), factor)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"{self.channels}, branches={self.branches}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


def _affine(
    x: Tensor,  # [R, C, H, W]
    branch: Tensor,  # [R]
    mean: Tensor,  # [B, C]
    inverse: Tensor,  # [B, C]
    weight: Tensor | None,  # [B, C]
    bias: Tensor | None,  # [B, C]
) -> Tensor:  # [R, C, H, W]
    """(x - mean) * inverse * weight + bias of each row's branch, in one pass over x."""
    scale = inverse if weight is None else inverse * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    if scale.dtype == x.dtype:
        return torch.addcmul(_per_row(shift, branch), x, _per_row(scale, branch))
    return (x * _per_row(scale, branch) + _per_row(shift, branch)).to(x.dtype)


def _per_row(t: Tensor, branch: Tensor) -> Tensor:
    """Rows of ``[B, C]`` as ``[R, C, 1, 1]``, to go with a map."""
    return t.index_select(0, branch)[:, :, None, None]


def _moments(
    x: Tensor,  # [R, C, H, W]
    branch: Tensor,  # [R]
    members: Tensor,  # [B, R], 1 where the row is the branch's
) -> tuple[Tensor, Tensor, Tensor]:  # values a channel [B], mean [B, C], variance [B, C]
    """Moments of each branch's rows in two passes; zeros for a branch without rows."""
    count = members.sum(1) * (x.shape[2] * x.shape[3])
    values = count.clamp_min(1).unsqueeze(1)
    mean = members @ x.sum((2, 3), dtype=members.dtype) / values
    centred = x - _per_row(mean, branch)
    return count, mean, members @ centred.mul_(centred).sum((2, 3)) / values


def _moments_of_all(
    x: Tensor, members: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_moments`, over the rows of all processes; differentiable."""
    wide = x.to(members.dtype)
    sums = members @ wide.sum((2, 3))
    squares = members @ (wide * wide).sum((2, 3))
    count = members.sum(1, keepdim=True) * (x.shape[2] * x.shape[3])
    total = sum_over_processes(torch.cat([sums, squares, count], 1).double(), group)
    channels = x.shape[1]
    count = total[:, -1:].detach()
    values = count.clamp_min(1)
    mean = total[:, :channels] / values
    var = (total[:, channels:-1] / values - mean * mean).clamp_min(0)
    return count.squeeze(1), mean.to(wide.dtype), var.to(wide.dtype)


class _BatchNorm(torch.autograd.Function):
    """The affine map by each branch's own moments, with the gradient through the moments.

    ``share`` [B] is 1 / values of a branch, zero where the moments do not depend on x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        branch: Tensor,
        members: Tensor,
        mean: Tensor,
        inverse: Tensor,
        share: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, branch, members, mean, inverse, share)
        return _affine(x, branch, mean, inverse, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, branch, members, mean, inverse, share = ctx.saved_tensors
        grad, share, wide = grads[0], share.unsqueeze(1), members.dtype
        again = torch.is_grad_enabled()
        if again:  # a second derivative: the moments have to be functions of x again
            mean, inverse = _recomputed(x, branch, members, mean, inverse, share, ctx.eps)
        x, grad_wide = x.to(wide), grad.to(wide)
        buffer = x * grad_wide
        sum_grad = members @ grad_wide.sum((2, 3))
        sum_product = members @ buffer.sum((2, 3)) - mean * sum_grad  # of (x - mean) * grad
        scale = inverse if weight is None else inverse * weight
        by_x = -scale * inverse * inverse * sum_product * share
        constant = -scale * sum_grad * share - mean * by_x
        out = None if again or torch.compiler.is_compiling() else buffer
        grad_x = torch.addcmul(_per_row(constant, branch), x, _per_row(by_x, branch), out=out)
        grad_x = torch.addcmul(grad_x, grad_wide, _per_row(scale, branch), out=out)
        grad_weight = None if weight is None else (sum_product * inverse).to(weight.dtype)
        grad_bias = None if weight is None else sum_grad.to(weight.dtype)
        return grad_x.to(grad.dtype), grad_weight, grad_bias, *[None] * 6


def _recomputed(
    x: Tensor,
    branch: Tensor,
    members: Tensor,
    mean: Tensor,
    inverse: Tensor,
    share: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation as functions of x, where they are ones."""
    own = share > 0
    mean_of_x = members @ x.sum((2, 3), dtype=members.dtype) * share
    mean = torch.where(own, mean_of_x, mean)
    centred = x - _per_row(mean, branch)
    var = members @ (centred * centred).sum((2, 3)) * share
    return mean, torch.where(own, torch.rsqrt(var + eps), inverse)
