"""Batch norm statistics computed anew after training, exactly instead of as a running average."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pyeff.nn import BranchBatchNorm2d, NestedBatchNorm2d
from pyeff.train.network import call, levels_of

_NORMS = (nn.BatchNorm2d, NestedBatchNorm2d, BranchBatchNorm2d)


def calibrate(model: nn.Module, batches: Mapping[str, Iterable[Tensor]]) -> None:
    """Replaces all running statistics by the plain average over some batches.

    The statistics are forgotten; then every (task, level) sees its task's batches in training
    mode, without gradient, with a cumulative average (``momentum=None``). Parameters do not change,
    and neither does anything else that only training mode does differently, such as dropout.

    Args:
        model: nested, or plain; changed in place.
        batches: task name to images ``[N, C, H, W]``, on the model's device; gone through once,
            all levels at each batch.

    Raises:
        ValueError: a task has no batch, or the model shares statistics between levels.

    Source: Yu, Huang, "Universally Slimmable Networks and Improved Training Techniques",
        ICCV 2019, section 3.2 (post-statistics of batch normalisation).
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS)]
    for norm in norms:
        if isinstance(norm, NestedBatchNorm2d) and norm.statistics != "private":
            raise ValueError(
                "calibrate: model must have statistics='private' (levels of different width have "
                f"no common average), got {norm.statistics!r}"
            )
    modes = [(m, m.training) for m in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        with torch.no_grad():
            for task, images in batches.items():
                _see(model, task, images)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _see(model: nn.Module, task: str, images: Iterable[Tensor]) -> None:
    count = 0
    for x in images:
        count += 1
        for level in range(1, levels_of(model) + 1):
            call(model, x, task, level)
    if not count:
        raise ValueError(
            f"calibrate: batches must hold images for every task, got none for {task!r}"
        )
