"""What one training step computes: levels, losses, gradients."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyeff.train.batches import seed_of
from pyeff.train.network import call


def levels_of_step(
    levels: int, rule: str, *, count: int = 4, seed: int = 0, step: int = 0
) -> list[int]:
    """Which levels one step trains, the largest first.

    Args:
        levels: how many the network has.
        rule: ``sum`` for all of them, ``sandwich`` for the largest, the smallest and random ones.
        count: levels a step under the sandwich rule.
        seed: of the run.
        step: 0-based; with the seed it decides the random levels, alike in every process.

    Returns:
        Levels from 1, falling.

    Source: sandwich rule: Yu, Huang, "Universally Slimmable Networks and Improved Training
        Techniques", ICCV 2019, section 3.3.
    """
    if rule == "sum" or levels <= count:
        return list(range(levels, 0, -1))
    drawn = random.Random(seed_of("levels", seed, step)).sample(range(2, levels), count - 2)
    return [levels, *sorted(drawn, reverse=True), 1]


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with another network's soft output: mean over n of ``-sum_c t log p``.

    Args:
        logits: ``[N, classes]``.
        target: probabilities ``[N, classes]``, without gradient.

    Returns:
        A scalar.
    """
    return -(target * functional.log_softmax(logits, dim=1)).sum(dim=1).mean()


class TrainStep(nn.Module):
    """The losses of one step: every level of every given task, in one forward.

    ``DistributedDataParallel`` wraps this module, so that it sees one forward and one backward a
    step. :meth:`accumulate` is the same for one process, with the memory of one level.

    Args:
        model: nested, or plain.
        distill: levels after the first learn the first one's detached soft output.
        label_smoothing: of the losses on labels.
        autocast: run the network in bfloat16 where autocast allows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        distill: bool = False,
        label_smoothing: float = 0.0,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._distill, self._smoothing, self._autocast = distill, label_smoothing, autocast

    def loss(
        self, x: Tensor, y: Tensor, task: str, level: int, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One level's loss.

        Args:
            x: images ``[N, C, H, W]``.
            y: labels int64 ``[N]``.
            task: name.
            level: from 1.
            teacher: the largest level's soft output ``[N, classes]``; ``None`` learns the labels.

        Returns:
            The scalar loss, and the teacher for the levels that follow.

        Source: in-place distillation: Yu, Huang, ICCV 2019, section 3.4.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast):
            logits = call(self.model, x, task, level)
        # The loss itself is never rounded to bfloat16; float64 stays what it is.
        logits = logits.float() if self._autocast else logits
        if teacher is not None:
            return soft_cross_entropy(logits, teacher), teacher
        value = functional.cross_entropy(logits, y, label_smoothing=self._smoothing)
        return value, functional.softmax(logits.detach(), dim=1) if self._distill else None

    def forward(
        self, batches: Mapping[str, tuple[Tensor, Tensor]], levels: Sequence[int]
    ) -> Tensor:
        """All losses: ``[tasks, levels]`` in the order given, to be summed and differentiated."""
        rows = []
        for task, (x, y) in batches.items():
            teacher: Tensor | None = None
            for level in levels:
                value, teacher = self.loss(x, y, task, level, teacher)
                rows.append(value)
        return torch.stack(rows).view(len(batches), len(levels))

    def accumulate(
        self, batches: Mapping[str, tuple[Tensor, Tensor]], levels: Sequence[int]
    ) -> Tensor:
        """Adds the gradient of all losses, level by level.

        Returns:
            The losses, detached: ``[tasks, levels]``.
        """
        rows = []
        for task, (x, y) in batches.items():
            teacher: Tensor | None = None
            for level in levels:
                value, teacher = self.loss(x, y, task, level, teacher)
                value.backward()
                rows.append(value.detach())
        return torch.stack(rows).view(len(batches), len(levels))
