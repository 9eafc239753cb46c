"""Layers without some of their channels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import CONSUMER, SCALE, ChannelGroup
from pyeff.nn import FactorizedConv2d

_Norm = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Cut:
    """What a layer loses.

    Attributes:
        outputs: its output channels (a norm's and a parameter's channels) to remove.
        inputs: its input channels to remove.
        axis: of a parameter, the dimension of ``outputs``.
        is_parameter: whether it is a parameter rather than a layer.
    """

    outputs: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    axis: int = 0
    is_parameter: bool = False


def cuts_of(model: nn.Module, removed: Iterable[tuple[ChannelGroup, Tensor]]) -> dict[str, Cut]:
    """What every layer loses when some channels of some groups go.

    Args:
        model: the network of the groups.
        removed: groups, each with a bool ``[channels]``.

    Returns:
        Names of layers and parameters to what they lose.
    """
    parameters = {name for name, _ in model.named_parameters()}
    cuts: dict[str, Cut] = {}
    for group, gone in removed:
        if not gone.any():
            continue
        for member in group.members:
            cut = cuts.setdefault(member.name, Cut())
            positions = member.index[gone].flatten().tolist()
            (cut.inputs if member.role == CONSUMER else cut.outputs).update(positions)
            if member.role == SCALE and member.name in parameters:
                cut.axis = scale_axis(model.get_parameter(member.name))
                cut.is_parameter = True
    return cuts


@torch.no_grad()
def cut_layers(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Removes channels of layers, in place.

    Args:
        model: the network; its layers get new, smaller parameters.
        cuts: as :func:`cuts_of` gives them.

    Returns:
        For each parameter that was cut, by its name: where each of its numbers was in the old one,
        counted in its flattened form; int64 of the new shape.

    Raises:
        ValueError: a layer would be left without a channel.
    """
    sources: dict[str, Tensor] = {}
    for name, cut in cuts.items():
        if cut.is_parameter:
            parent, _, own = name.rpartition(".")
            holder = model.get_submodule(parent)
            taken = {own: _without(_positions(getattr(holder, own)), cut.axis, cut.outputs, name)}
            prefix = f"{parent}." if parent else ""
        else:
            holder = model.get_submodule(name)
            taken = _cut_layer(holder, cut, name)
            prefix = f"{name}." if name else ""
        for own, source in taken.items():
            _take(holder, own, source)
            sources[prefix + own] = source
    for module in model.modules():
        if isinstance(module, FactorizedConv2d):
            _refresh(module)
    return sources


def _cut_layer(layer: nn.Module, cut: Cut, name: str) -> dict[str, Tensor]:
    """The layer's new sizes, and what is left of which of its tensors."""
    sizes: Any = layer
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _cut_convolution(layer, cut, name)
    if isinstance(layer, nn.Linear):
        weight = _without(_positions(layer.weight), 0, cut.outputs, name)
        weight = _without(weight, 1, cut.inputs, name)
        sizes.out_features, sizes.in_features = weight.shape
        return {"weight": weight, **_vector(layer, "bias", cut.outputs, name)}
    taken: dict[str, Tensor] = {}
    for own in ("weight", "bias", "running_mean", "running_var"):
        taken |= _vector(layer, own, cut.outputs, name)
    if isinstance(layer, _Norm):
        sizes.num_features -= len(cut.outputs)
    elif isinstance(layer, nn.PReLU):
        sizes.num_parameters -= len(cut.outputs)
    else:
        raise ValueError(
            f"shrink: {name} must be a convolution, a linear layer, a norm of channels or a PReLU, "
            f"got {type(layer).__name__}"
        )
    return taken


def _cut_convolution(layer: nn.modules.conv._ConvNd, cut: Cut, name: str) -> dict[str, Tensor]:
    grid = _positions(layer.weight)
    inputs, outputs = (0, 1) if layer.transposed else (1, 0)
    if layer.groups == 1:
        grid = _without(grid, outputs, cut.outputs, name)
        grid = _without(grid, inputs, cut.inputs, name)
        layer.in_channels, layer.out_channels = grid.shape[inputs], grid.shape[outputs]
        return {"weight": grid, **_vector(layer, "bias", cut.outputs, name)}
    made, read = (n // layer.groups for n in (layer.out_channels, layer.in_channels))
    gone = {channel // made for channel in cut.outputs}
    by_inputs = {channel // read for channel in cut.inputs}
    if len(cut.outputs) != len(gone) * made or (by_inputs and by_inputs != gone):
        raise ValueError(
            f"shrink: {name} must lose whole groups of {read} inputs and {made} outputs, got "
            f"outputs {sorted(cut.outputs)} and inputs {sorted(cut.inputs)}"
        )
    grid = _without(grid.unflatten(0, (layer.groups, -1)), 0, gone, name).flatten(0, 1)
    layer.groups -= len(gone)
    layer.in_channels, layer.out_channels = layer.groups * read, layer.groups * made
    return {"weight": grid, **_vector(layer, "bias", cut.outputs, name)}


def _vector(layer: nn.Module, own: str, gone: set[int], name: str) -> dict[str, Tensor]:
    """What is left of a tensor with one number a channel, where the layer has it."""
    tensor = getattr(layer, own, None)
    if not isinstance(tensor, Tensor) or not gone:
        return {}
    return {own: _without(_positions(tensor), 0, gone, name)}


def _positions(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel()).view(tensor.shape)


def _without(grid: Tensor, axis: int, gone: set[int], name: str) -> Tensor:
    kept = [position for position in range(grid.shape[axis]) if position not in gone]
    if not kept:
        raise ValueError(f"shrink: every layer must keep a channel, got none left for {name}")
    return grid.index_select(axis, torch.tensor(kept))


def taken_from(tensor: Tensor, source: Tensor) -> Tensor:
    """A copy of the numbers of a tensor at given places.

    Args:
        tensor: of any shape.
        source: places in its flattened form, as :func:`cut_layers` gives them.

    Returns:
        Of ``source``'s shape, in the tensor's memory format.
    """
    taken = tensor.detach().reshape(-1)[source.to(tensor.device)]
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _take(holder: nn.Module, own: str, source: Tensor) -> None:
    old = getattr(holder, own)
    new = taken_from(old, source)
    if own in holder._parameters:
        holder._parameters[own] = nn.Parameter(new, old.requires_grad)
    else:
        holder._buffers[own] = new


def _refresh(pair: FactorizedConv2d) -> None:
    """The sizes that a pair tells are those of its members."""
    if isinstance(pair.first, nn.Conv2d) and isinstance(pair.second, nn.Conv2d):
        pair.in_channels, pair.rank = pair.first.in_channels, pair.first.out_channels
        pair.out_channels = pair.second.out_channels


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a layer's input and output that holds its channels, from the end."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return -1 - len(layer.kernel_size)
    return -1


def filters_of(layer: nn.Module) -> Tensor:
    """A convolution's or linear layer's weights, a row for each output: ``[C_out, ...]``."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


@torch.no_grad()
def zero_filters(layer: nn.Module, outputs: Tensor) -> None:
    """Sets the weights of some outputs of a convolution or linear layer to zero, in place.

    Args:
        layer: the layer.
        outputs: bool ``[C_out]``.
    """
    weight = layer.get_parameter("weight")
    gone = outputs.to(weight.device)
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        gone = gone.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        weight[gone.reshape(weight.shape[:2])] = 0
    else:
        weight[gone] = 0


def scale_axis(parameter: Tensor) -> int:
    """The dimension of a parameter that counts channels: the last one of more than one number."""
    sizes = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    return sizes[-1] if sizes else 0


def composed(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two cuts, one after the other, as one."""
    both = dict(first)
    for name, source in second.items():
        both[name] = taken_from(first[name], source) if name in first else source
    return both


def layer_sizes(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Output channels of convolutions and linear layers."""
    found = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        found[name] = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return found
