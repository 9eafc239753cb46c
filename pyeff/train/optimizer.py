"""Nesterov's SGD with weight decay on weights only, and its state under parameter names."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyeff.nn import BranchConv2d, BranchLinear, Combiner, NestedConv2d, NestedLinear

_WEIGHTED = (
    nn.Conv2d,
    nn.Linear,
    NestedConv2d,
    NestedLinear,
    BranchConv2d,
    BranchLinear,
    Combiner,
)
_MOMENTUM = "optimizer.momentum."


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: weights of convolutions and linears.

    Biases and batch norm's scales, however stacked, are left alone.

    Source: Yu et al., "Slimmable Neural Networks", ICLR 2019, released recipe.
    """
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _WEIGHTED)
    }


def build_optimizer(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD over all parameters, in two groups: with and without weight decay.

    Args:
        model: whose parameters are trained.
        lr: initial learning rate.
        momentum: Nesterov's, if above 0.
        weight_decay: of the first group.

    Returns:
        The optimiser.
    """
    decayed = decayed_names(model)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=lr,
        momentum=momentum,
        nesterov=momentum > 0,
        # Not fused: that one does not raise a tensor's version, by which packed copies of weights
        # are found to be out of date.
        foreach=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The momentum of every parameter that has one, by the parameter's name."""
    return {_MOMENTUM + name: buffer for name, buffer in _buffers(model, optimizer)}


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.SGD, tensors: Mapping[str, Tensor]
) -> None:
    """Restores what :func:`optimizer_tensors` gave; a parameter without an entry has no momentum.

    Raises:
        ValueError: a momentum belongs to no parameter, or has another shape.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, saved in tensors.items():
        if not key.startswith(_MOMENTUM):
            continue
        parameter = parameters.get(key.removeprefix(_MOMENTUM))
        if parameter is None or parameter.shape != saved.shape:
            raise ValueError(
                f"resume: {key} must belong to a parameter of its shape, got {list(saved.shape)}"
            )
        buffer = torch.empty_like(parameter, requires_grad=False).copy_(saved)
        optimizer.state[parameter]["momentum_buffer"] = buffer


def _buffers(model: nn.Module, optimizer: torch.optim.SGD) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            yield name, buffer
