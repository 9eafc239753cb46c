"""What a network for segmentation is trained with: targets of its size, class weights, the loss."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pyeff.train.segmentation_data import IGNORE

# Offsets of the weights' formula, for labels at 1/8 and at the full size.
ENCODER_OFFSET, FULL_OFFSET = 1.20, 1.10
_CHUNK = 64


def targets_for(labels: Tensor, stride: int) -> Tensor:
    """Labels for an output of a smaller size: of each of its cells the pixel in the middle.

    Args:
        labels: ``[N, H, W]``.
        stride: pixels a cell, on either axis.

    Returns:
        ``[N, ceil(H / stride), ceil(W / stride)]``; ``labels`` itself for a stride of 1. A cell
        whose middle lies beyond the picture (the network padded it) belongs to no class.
    """
    if stride == 1:
        return labels
    below, beside = -labels.shape[1] % stride, -labels.shape[2] % stride
    padded = functional.pad(labels, (0, beside, 0, below), value=IGNORE)
    return padded[:, stride // 2 :: stride, stride // 2 :: stride]


def class_counts(labels: Tensor, classes: int, stride: int = 1) -> Tensor:
    """Pixels of every class in a split.

    Args:
        labels: uint8 ``[N, H, W]``.
        classes: how many there are.
        stride: count in the targets of an output with that stride, see :func:`targets_for`.

    Returns:
        float64 ``[classes + 1]``; the last one counts pixels of no class.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for piece in labels.split(_CHUNK):
        counts += torch.bincount(targets_for(piece, stride).reshape(-1).int(), minlength=256)
    return torch.cat([counts[:classes], counts[IGNORE:]]).double()


def class_weights(counts: Tensor, offset: float) -> Tensor:
    """Weights of the classes in the loss: ``1 / ln(offset + p)``.

    Args:
        counts: what :func:`class_counts` gave; ``p`` is a class's share of all pixels, those of no
            class among them.
        offset: above 1; the nearer to 1, the more rare classes weigh.

    Returns:
        float32 ``[classes]``.

    Source: Paszke et al., "ENet", 2016, with the offsets of ERFNet's released training code.
    """
    share = counts[:-1] / counts.sum()
    return (1 / torch.log(offset + share)).float()


def pixel_loss(
    logits: Tensor, targets: Tensor, weights: Tensor, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """Cross entropy of all pixels that have a class, weighted by it.

    ``sum_i w[t_i] * -log softmax(logits_i)[t_i] / sum_i w[t_i]``, where the lower sum runs over the
    pixels of all processes and is divided by their number, so that the mean of the processes'
    gradients is that of the joint batch.

    Args:
        logits: ``[N, classes, h, w]``, float32 or float64.
        targets: int64 ``[N, h, w]``, 255 for no class.
        weights: ``[classes]``.
        mean: the mean of a tensor over the processes.

    Returns:
        A scalar; 0 where no pixel has a class.
    """
    weights = weights.to(logits.dtype)
    # One more place, of weight 0, for pixels of no class.
    padded = torch.cat([weights, weights.new_zeros(1)])
    total = padded[targets.clamp(max=len(weights))].sum()
    loss = functional.cross_entropy(
        logits, targets, weight=weights, ignore_index=IGNORE, reduction="sum"
    )
    return loss / mean(total).clamp_min(torch.finfo(logits.dtype).tiny)
