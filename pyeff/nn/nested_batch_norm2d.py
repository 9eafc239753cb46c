"""Batch norm with statistics of its own for every (task, level)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pyeff.nn.batch_statistics import is_distributed, synchronised_batch_norm
from pyeff.nn.units import Range

SHARING = ("private", "task", "shared")


class NestedBatchNorm2d(nn.Module):
    """Batch norm over an interval of channels, one row of statistics per (task, level).

    Running means and variances that mix several widths are right for none of them: at test time
    accuracy falls to about chance (Yu et al., ICLR 2019). So the statistics are stacked buffers
    ``[T, L, C]``; ``statistics="shared"`` ([1, 1, C]) exists to show the collapse.

    Args:
        channels: channels C of the full layer.
        tasks: number of tasks T.
        levels: number of levels L.
        affine: who has a scale and shift of its own: ``"private"`` (task, level), ``"task"``,
            ``"shared"`` (one for all) or ``"none"``.
        statistics: who has running statistics of its own: ``"private"``, ``"task"``, ``"shared"``.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; ``None`` for a cumulative
            average (calibration), which needs private statistics.

    Raises:
        ValueError: an unknown way of sharing, a size below 1.

    Source: Yu et al., "Slimmable Neural Networks", ICLR 2019, section 3 (switchable batch norm).

    Example:
        >>> norm = NestedBatchNorm2d(8, tasks=2, levels=4)
        >>> norm(torch.randn(2, 4, 3, 3), task=1, level=2, channel_range=(2, 6)).shape
        torch.Size([2, 4, 3, 3])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        tasks: int = 1,
        levels: int = 1,
        *,
        affine: str = "shared",
        statistics: str = "private",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        if affine not in (*SHARING, "none"):
            raise ValueError(
                f"NestedBatchNorm2d: affine must be one of {(*SHARING, 'none')}, got {affine!r}"
            )
        if statistics not in SHARING:
            raise ValueError(
                f"NestedBatchNorm2d: statistics must be one of {SHARING}, got {statistics!r}"
            )
        if min(channels, tasks, levels) < 1:
            raise ValueError(
                "NestedBatchNorm2d: channels, tasks and levels must be positive, "
                f"got {channels}, {tasks} and {levels}"
            )
        self.channels, self.tasks, self.levels = channels, tasks, levels
        self.affine, self.statistics = affine, statistics
        self.eps, self.momentum = eps, momentum
        self.synchronised = False
        self.process_group: ProcessGroup | None = None
        if affine == "none":
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        else:
            rows = self._rows(affine)
            self.weight = nn.Parameter(torch.ones(*rows, channels))
            self.bias = nn.Parameter(torch.zeros(*rows, channels))
        rows = self._rows(statistics)
        self.register_buffer("running_mean", torch.zeros(*rows, channels))
        self.register_buffer("running_var", torch.ones(*rows, channels))
        self.register_buffer("num_batches_tracked", torch.zeros(rows, dtype=torch.int64))

    def _rows(self, sharing: str) -> tuple[int, int]:
        return {
            "private": (self.tasks, self.levels),
            "task": (self.tasks, 1),
            "shared": (1, 1),
        }[sharing]

    def reset_running_stats(self) -> None:
        """Forgets all statistics: mean 0, variance 1, no batches seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forgets the statistics and sets every scale to 1 and every shift to 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, task: int = 0, level: int = 1, channel_range: Range | None = None
    ) -> Tensor:
        """Normalises ``x`` as the given task and level do.

        Args:
            x: ``[N, C', H, W]``, exactly the channels of ``channel_range``.
            task: index of the task, from 0.
            level: the level, from 1.
            channel_range: channels [lo, hi) of the full layer; ``None`` for all.

        Returns:
            ``[N, C', H, W]`` in x's memory format.

        Raises:
            ValueError: a task or level out of range, or x of another width than the range; a
                cumulative average over statistics that several widths share.
        """
        low, high = (0, self.channels) if channel_range is None else channel_range
        if isinstance(level, int):
            self._check(x, task, level, low, high)
        mean, var, weight, bias = self.row(task, level, (low, high))
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        count = self.batches(task, level)
        count += 1
        factor = 1.0 / float(count) if self.momentum is None else self.momentum
        if self.synchronised and is_distributed(self.process_group):
            return synchronised_batch_norm(
                x, mean, var, weight, bias, factor, self.eps, self.process_group
            )
        return F.batch_norm(x, mean, var, weight, bias, True, factor, self.eps)

    def row(
        self, task: int, level: int, channel_range: Range
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean, variance, scale and shift ``[C']`` of a task (from 0) and level (from 1); views."""
        low, high = channel_range
        mean = _row(self.running_mean, task, level)[low:high]
        var = _row(self.running_var, task, level)[low:high]
        if self.weight is None or self.bias is None:
            return mean, var, None, None
        weight = _row(self.weight, task, level)[low:high]
        return mean, var, weight, _row(self.bias, task, level)[low:high]

    def batches(self, task: int, level: int) -> Tensor:
        """How many batches the statistics of a task and level have seen: 0-d int64, a view."""
        return _row(self.num_batches_tracked, task, level)

    def _check(self, x: Tensor, task: int, level: int, low: int, high: int) -> None:
        if not 0 <= task < self.tasks:
            raise ValueError(f"NestedBatchNorm2d: task must be in 0..{self.tasks - 1}, got {task}")
        if not 1 <= level <= self.levels:
            raise ValueError(f"NestedBatchNorm2d: level must be in 1..{self.levels}, got {level}")
        if not 0 <= low < high <= self.channels or x.shape[1] != high - low:
            raise ValueError(
                f"NestedBatchNorm2d: x must have the channels of channel_range ({low}, {high}) "
                f"within {self.channels}, got {x.shape[1]} channels"
            )
        if self.training and self.momentum is None and self.statistics != "private":
            raise ValueError(
                "NestedBatchNorm2d: momentum=None must go with statistics='private' (levels of "
                f"different width have no common count), got statistics={self.statistics!r}"
            )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"{self.channels}, tasks={self.tasks}, levels={self.levels}, affine={self.affine!r}, "
            f"statistics={self.statistics!r}, eps={self.eps}, momentum={self.momentum}"
        )


def _row(stack: Tensor, task: int, level: int) -> Tensor:
    """The row of a stack ``[T or 1, L or 1, ...]`` that a task and a level use."""
    by_task = stack[task if stack.shape[0] > 1 else 0]
    return by_task[level - 1 if stack.shape[1] > 1 else 0]
