"""How many parameters a network keeps when some channels go and some layers are factored."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import CONSUMER, ChannelGroup


class ParameterCount:
    """Counts what is left of a network, without building it.

    Args:
        model: the network.
        groups: its channel groups.

    Attributes:
        total: parameters of the whole network.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> None:
        self.groups = tuple(groups)
        self.total = sum(parameter.numel() for parameter in model.parameters())
        self._layers = {
            name: module for name, module in model.named_modules() if _is_counted(module)
        }
        self._alone = {
            member.name: (model.get_parameter(member.name), member.axis)
            for group in groups
            for member in group.members
            if member.name not in self._layers and member.name in dict(model.named_parameters())
        }
        counted = sum(self._size(name, *self._sides(name)) for name in self._layers)
        counted += sum(parameter.numel() for parameter, _ in self._alone.values())
        # Parameters that no group and no rank can take away.
        self._rest = self.total - counted

    def after(self, alive: Sequence[Tensor] = (), ranks: Mapping[str, int] | None = None) -> int:
        """Parameters after removal and factorisation.

        Args:
            alive: for each group, bool ``[channels]``: which stay; none for all.
            ranks: for names of convolutions and linear layers, the rank that they are factored to,
                where that makes them smaller.
        """
        made, read = self._lost(alive)
        count = self._rest
        for name in self._layers:
            outputs, inputs = self._sides(name)
            outputs, inputs = outputs - made.get(name, 0), inputs - read.get(name, 0)
            count += self._size(name, outputs, inputs, (ranks or {}).get(name))
        for name, (parameter, axis) in self._alone.items():
            count += (
                parameter.numel()
                // parameter.shape[axis]
                * (parameter.shape[axis] - made.get(name, 0))
            )
        return count

    def _lost(self, alive: Sequence[Tensor]) -> tuple[dict[str, int], dict[str, int]]:
        """Output and input channels that each layer loses. Groups do not overlap."""
        made: dict[str, int] = {}
        read: dict[str, int] = {}
        for group, stays in zip(self.groups, alive, strict=False):
            gone = group.channels - int(stays.sum())
            for member in group.members if gone else ():
                side = read if member.role == CONSUMER else made
                side[member.name] = side.get(member.name, 0) + gone * member.index.shape[1]
        return made, read

    def _sides(self, name: str) -> tuple[int, int]:
        module = self._layers[name]
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.out_channels, module.in_channels
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        return next(iter(module.parameters())).shape[0], 1

    def _size(self, name: str, outputs: int, inputs: int, rank: int | None = None) -> int:
        """Parameters of a layer with so many channels."""
        module = self._layers[name]
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return outputs * sum(1 for _ in module.parameters(recurse=False))
        taps = 1
        if isinstance(module, nn.modules.conv._ConvNd):
            taps = math.prod(module.kernel_size)
            if module.groups > 1:
                # Whole groups go, so that each filter keeps its inputs.
                inputs, rank = module.in_channels // module.groups, None
        weight = outputs * inputs * taps
        if rank is not None:
            weight = min(weight, rank * (outputs + inputs * taps))
        return weight + (outputs if module.bias is not None else 0)


def _is_counted(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return True
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
    return isinstance(module, norms) and any(True for _ in module.parameters(recurse=False))


def all_alive(groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Masks under which every channel stays."""
    return [torch.ones(group.channels, dtype=torch.bool) for group in groups]
