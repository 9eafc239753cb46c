"""OrthoReg: pushes filters apart that point the same way. For comparison; not a compression."""

import math

import torch
from torch import Tensor, nn

_OP = "OrthoReg"
_EPS = 1e-7


def repulsion(cosines: Tensor, scale: float = 10.0) -> Tensor:
    """How strongly each pair of filters is pushed apart: ``scale * sigmoid(scale * (c - 1))``.

    Half the gradient of ``sum over i != j of log(1 + exp(scale * (c_ij - 1)))`` with regard to the
    filters is ``repulsion(c) @ filters``; half, since the sum counts every pair twice.

    Args:
        cosines: ``[F, F]``, of unit filters with each other.
        scale: the paper's lambda; from 7 to 10 pairs at more than 90 degrees are hardly moved.

    Returns:
        ``[F, F]``, the diagonal zero.
    """
    strength = scale * torch.sigmoid(scale * (cosines - 1))
    return strength - torch.diag(strength.diagonal())


class OrthoReg:
    """Moves the filters of every convolution apart after each of the optimiser's steps.

    ``W <- W - beta lr G U``: U are the filters at unit length, G their :func:`repulsion`. The
    gradient through the normalisation is left out, as in the authors' code; biases and norms are
    left alone. Filters that are orthogonal are hard to compress, so it goes badly with
    :class:`LowRank`.

    Args:
        model: the network. All its convolutions with more than one filter are regularised, those of
            several groups group by group, but for those whose weight takes no gradient or is
            computed from other parameters.
        beta: strength.
        scale: the paper's lambda.

    Raises:
        ValueError: numbers that are negative; a network without such convolutions.

    Source: Rodriguez et al., "Regularizing CNNs with Locally Constrained Decorrelations",
    ICLR 2017. The formula is the paper's; the authors' PyTorch file lacks an exponential.

    Example:
        >>> net = nn.Conv2d(3, 8, 3)
        >>> OrthoReg(net).after_step(lr=0.1)
    """

    def __init__(self, model: nn.Module, beta: float = 0.01, scale: float = 10.0) -> None:
        for name, value in (("beta", beta), ("scale", scale)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{_OP}: {name} must not be negative, got {value}")
        self.beta, self.scale = beta, scale
        self._convolutions = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.conv._ConvNd) and module.out_channels > module.groups
            # A weight that is computed from others cannot be moved.
            if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
            if weight.requires_grad
        ]
        if not self._convolutions:
            raise ValueError(
                f"{_OP}: model must have convolutions of more than one filter whose weight takes a "
                "gradient, got none"
            )

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """To be called after every step of the optimiser.

        Args:
            lr: the current learning rate.
        """
        for module in self._convolutions:
            weight = module.weight
            filters = _filters(weight, module)
            unit = filters / (filters.norm(dim=2, keepdim=True) + _EPS)
            cosines = unit @ unit.transpose(1, 2)
            moved = torch.stack([repulsion(c, self.scale) for c in cosines]) @ unit
            filters = filters - self.beta * lr * moved
            weight.copy_(_as_weight(filters, weight, module))


def _filters(weight: Tensor, module: nn.modules.conv._ConvNd) -> Tensor:
    """``[groups, F / groups, fan-in]``."""
    if module.transposed:  # [C_in, F / groups, ...]
        return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2)
    return weight.unflatten(0, (module.groups, -1)).flatten(2)


def _as_weight(filters: Tensor, weight: Tensor, module: nn.modules.conv._ConvNd) -> Tensor:
    if module.transposed:
        taps = weight.shape[2:]
        return filters.unflatten(2, (-1, *taps)).transpose(1, 2).flatten(0, 1)
    return filters.reshape(weight.shape)
