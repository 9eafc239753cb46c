"""What one training step of a HydraNet computes: the losses of classes and of the gate."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from pyeff.models.hydranet import HydraNet, HydraOutput
from pyeff.train.gate_statistics import GateStatistics
from pyeff.train.network import is_supervised
from pyeff.train.step import TrainStep


class HydraStep(TrainStep):
    """The loss of a HydraNet, ``CE(logits, y) + lambda_g * CE(scores, group_of[y]) + balance``.

    The second term is that of a supervised gate. One that learns from the task's loss has the
    third instead, if it brings one (the noisy gate's importance and load losses).

    Args:
        model: the network.
        statistics: counts what the gate did with every batch.
        gate_loss_weight: lambda_g.
        label_smoothing: of the loss on classes.
        autocast: run the network in bfloat16 where autocast allows.
        compile: run it through :func:`torch.compile`.

    Attributes:
        forced: whether the branch that owns an image's class is always among the chosen (teacher
            forcing).

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
        Inference", CVPR 2018, section 3; balance losses: Shazeer et al., "Outrageously Large
        Neural Networks", ICLR 2017, section 4.
    """

    def __init__(
        self,
        model: HydraNet,
        statistics: GateStatistics,
        *,
        gate_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        autocast: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(model, label_smoothing=label_smoothing, autocast=autocast)
        self.forced = False
        self.statistics = statistics
        self._gate_weight = gate_loss_weight
        self._supervised = is_supervised(model)
        run: Callable[..., HydraOutput] = model.forward_with_gate
        self._run = torch.compile(run) if compile else run

    def loss(
        self, x: Tensor, y: Tensor, task: str, level: int, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of a batch; a HydraNet has one task and one level.

        Args:
            x: images ``[N, C, H, W]``.
            y: labels int64 ``[N]``.
            task, level, teacher: as :class:`TrainStep` has them.

        Returns:
            The scalar loss, and no teacher.
        """
        model = cast(HydraNet, self.model)
        groups = model.class_group[y] if self._supervised else None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast):
            output = self._run(x, groups=groups if self.forced else None)
        # As in TrainStep: a loss is never rounded to bfloat16.
        logits = output.logits.float() if self._autocast else output.logits
        scores = output.scores.float() if self._autocast else output.scores
        value = functional.cross_entropy(logits, y, label_smoothing=self._smoothing)
        if groups is not None:
            value = value + self._gate_weight * functional.cross_entropy(scores, groups)
        else:
            value = value + output.auxiliary.to(value.dtype)
        self.statistics.add(logits, scores, output.routes.index, y, groups)
        return value, None
