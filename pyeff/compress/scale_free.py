"""Layers whose length does not matter, because a batch norm divides by it, and keeping it.

A penalty shortens filters and a batch norm behind them hides it: the outputs stay, but gradients
grow as 1 / length and a step of the optimiser turns the filters by a learning rate that grows as
1 / length^2. Shortened tenfold, a network forgets what it has learned.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyeff.compress.constants import norms_after

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
# Buffers of optimisers that go as powers of the gradient.
_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def scale_free_layers(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Layers that only a batch norm reads.

    Args:
        model: the network; it is run once in eval mode, its mode is kept.
        inputs: of the pass.

    Returns:
        Names of convolutions and linear layers, and the name of the norm of each. A layer that is
        called more than once, or whose weight is another's too, is not among them.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and module._parameters.get("weight") is not None:
            owners.setdefault(id(module.weight), []).append(name)
    return norms_after(model, inputs, [names[0] for names in owners.values() if len(names) == 1])


class KeptScale:
    """The mean length of the live filters of scale-free layers, before and after a penalty.

    Args:
        model: the network.
        layers: of :func:`scale_free_layers`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str]) -> None:
        self.model, self.layers = model, dict(layers)

    def lengths(self) -> dict[str, Tensor]:
        """The length of every filter, ``[outputs]``, of layers whose norm uses the batch."""
        return {
            name: _filters(self.model.get_submodule(name)).norm(dim=1)
            for name, norm in self.layers.items()
            if self.model.get_submodule(norm).training
        }

    @torch.no_grad()
    def restore(self, before: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Makes each layer's live filters as long as they were, in the mean.

        Weight and bias are multiplied by one number for the layer, the norm's running statistics
        and the optimiser's buffers with them. What the network computes stays the same.

        Args:
            before: :meth:`lengths` before the penalty.
            optimizer: of the network.
        """
        for name, lengths in before.items():
            layer = self.model.get_submodule(name)
            left = _filters(layer).norm(dim=1)
            live = left > 0
            if not live.any():
                continue
            factor = float(lengths[live].double().mean() / left[live].double().mean())
            for parameter in (layer.weight, layer.bias):
                if isinstance(parameter, Tensor):
                    parameter.mul_(factor)
                    for key, power in _POWERS.items():
                        buffer = optimizer.state.get(parameter, {}).get(key)
                        if isinstance(buffer, Tensor):
                            buffer.div_(factor**power)
            norm = self.model.get_submodule(self.layers[name])
            if isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
                norm.running_mean.mul_(factor)
                norm.running_var.mul_(factor**2)


def _filters(layer: nn.Module) -> Tensor:
    """The weight as ``[outputs, anything]``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        groups = layer.groups  # [in, out / groups, ...]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.detach().flatten(1)
