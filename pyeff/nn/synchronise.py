"""Turning every batch norm of a model into one over all processes."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pyeff.nn.batch_statistics import is_distributed, synchronised_batch_norm
from pyeff.nn.branch_batch_norm2d import BranchBatchNorm2d
from pyeff.nn.nested_batch_norm2d import NestedBatchNorm2d


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose batch statistics, in training, are those of all processes.

    Args:
        process_group: the processes; ``None`` for all. The others are nn.BatchNorm2d's.
    """

    process_group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x`` ``[N, C, H, W]``."""
        if not self.training or not is_distributed(self.process_group):
            return super().forward(x)
        self._check_input_dim(x)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return synchronised_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            factor,
            self.eps,
            self.process_group,
        )


def synchronise_batch_norm(
    model: nn.Module, process_group: ProcessGroup | None = None
) -> nn.Module:
    """Makes every batch norm in ``model`` use the batch statistics of all processes in training.

    ``NestedBatchNorm2d`` and ``BranchBatchNorm2d`` are told to; ``nn.BatchNorm2d`` is replaced by
    :class:`SynchronisedBatchNorm2d` (same parameters and buffers). Without an initialised process
    group, or in eval mode, nothing changes. Parameters stay the same tensors, so an optimiser may
    exist already.

    Args:
        model: changed in place.
        process_group: the processes; ``None`` for all.

    Returns:
        ``model``, or its replacement where ``model`` itself is an ``nn.BatchNorm2d``.
    """
    if isinstance(model, NestedBatchNorm2d | BranchBatchNorm2d):
        model.synchronised, model.process_group = True, process_group
        return model
    if isinstance(model, SynchronisedBatchNorm2d):
        model.process_group = process_group
        return model
    if isinstance(model, nn.BatchNorm2d):
        replacement = SynchronisedBatchNorm2d(
            model.num_features,
            model.eps,
            model.momentum,
            model.affine,
            model.track_running_stats,
            device="meta",
        )
        replacement._parameters = dict(model._parameters)
        replacement._buffers = dict(model._buffers)
        replacement.process_group = process_group
        return replacement.train(model.training)
    for name, child in list(model.named_children()):
        changed = synchronise_batch_norm(child, process_group)
        if changed is not child:
            setattr(model, name, changed)
    return model
