"""SGD with weight decay on weights only, and its state under parameter names."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pyeff.nn import (
    BranchConv2d,
    BranchLinear,
    Combiner,
    ExpandedConv2d,
    ExpandedLinear,
    NestedConv2d,
    NestedLinear,
)

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
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
    factors: bool = True,
) -> torch.optim.SGD:
    """SGD over all parameters, in two groups: with and without weight decay.

    Args:
        model: whose parameters are trained.
        lr: initial learning rate.
        momentum: 0 has none.
        weight_decay: of the first group.
        nesterov: Nesterov's momentum, rather than the plain one.
        factors: whether weights of the members of expanded layers are in the first group;
            :func:`add_product_decay` is for those that are not.

    Returns:
        The optimiser.
    """
    decayed = decayed_names(model)
    if not factors:
        inside = tuple(f"{name}." if name else "" for name, _ in _chains(model))
        decayed = {name for name in decayed if not name.startswith(inside)}
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        # Not fused: that one does not raise a tensor's version, by which packed copies of weights
        # are found to be out of date.
        foreach=True,
    )


def _chains(model: nn.Module) -> list[tuple[str, ExpandedConv2d | ExpandedLinear]]:
    """The expanded layers of a network by their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ExpandedConv2d | ExpandedLinear)
    ]


def add_product_decay(model: nn.Module, weight_decay: float) -> None:
    """Adds to the gradients what weight decay on the contracted weights would.

    That is the gradient of ``weight_decay / 2 * sum ||W||^2`` over the expanded layers, W being the
    weight that a layer contracts to. Weights that are frozen get none.

    Args:
        model: after its backward pass.
        weight_decay: the factor.
    """
    chains = [chain for _, chain in _chains(model)]
    weights = [cast(Tensor, member.weight) for chain in chains for member in chain.members]
    factors = [weight for weight in weights if weight.requires_grad]
    if not factors or not weight_decay:
        return
    penalty = torch.stack([chain.product_norm() for chain in chains]).sum()
    # Not backward(): that would run the hooks by which several processes average gradients.
    found = torch.autograd.grad(0.5 * weight_decay * penalty, factors)
    for factor, gradient in zip(factors, found, strict=True):
        factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)


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
