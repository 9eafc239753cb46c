"""Counting what a network of plain torch layers costs, without running its arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyeff.measure.memory import peak_activation_bytes
from pyeff.nn import (
    ConvNorm2d,
    Downsampler,
    ExpandedConv2d,
    ExpandedLinear,
    FactorizedConv2d,
    Reparam,
)

_WHOLE = (
    *(ConvNorm2d, Downsampler, FactorizedConv2d),
    *(ExpandedConv2d, ExpandedLinear, Reparam),
)


@dataclass(frozen=True)
class LevelCost:
    """What one level of one task costs, for one image.

    Attributes:
        level: from 1.
        params: parameters that this level reads: weights, biases, norms' scales and shifts.
        conv_fc_params: weights of convolutions and linear layers only, as papers count.
        macs: multiply-adds of convolutions and linear layers (1 MAC = 2 FLOP).
        weight_bytes: bytes of the parameters and of the norms' statistics.
        peak_bytes: most bytes of activations alive at once, the image included, without gradient.
        latency_s: seconds for one image; ``None`` where it was not measured.
    """

    level: int
    params: int
    conv_fc_params: int
    macs: int
    weight_bytes: int
    peak_bytes: int
    latency_s: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Weights and activations together."""
        return self.weight_bytes + self.peak_bytes


@dataclass(frozen=True)
class LayerCost:
    """Weights and multiply-adds of one convolution or linear layer, for one image."""

    name: str
    weights: int
    macs: int


def layer_costs(model: nn.Module, image: tuple[int, ...]) -> tuple[list[LayerCost], int]:
    """Counts a network of torch layers on the meta device.

    Args:
        model: a network of torch layers on the meta device.
        image: (channels, height, width) of one image, or (features,).

    Returns:
        One entry for each call of a convolution or linear layer, in running order; and the peak of
        :func:`peak_activation_bytes`.
    """
    found: list[LayerCost] = []

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            found.extend(_costs_of(name, layer, inputs[0], out))

        return count

    handles: list[RemovableHandle] = [
        layer.register_forward_hook(counter(name)) for name, layer in _counted(model)
    ]
    dtype = next(model.parameters()).dtype
    x = torch.empty(1, *image, device="meta", dtype=dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    # A pass of its own: what a layer computes of its weights once, and keeps, is no activation.
    return found, peak_activation_bytes(model, x)


def _counted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that are counted; one that runs its members as one call, as a whole."""
    named = dict(model.named_modules())
    as_one = {n for n, layer in named.items() if isinstance(layer, _WHOLE) and layer.is_whole}
    inside = tuple(f"{name}." for name in as_one)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return [
        (name, layer)
        for name, layer in named.items()
        if name in as_one or (isinstance(layer, kinds) and not name.startswith(inside))
    ]


def _costs_of(name: str, layer: nn.Module, x: Tensor, out: Tensor) -> list[LayerCost]:
    """What one call of a layer costs."""
    if isinstance(layer, FactorizedConv2d):
        # The map between the members has one side of x and one of the result.
        vertical = layer.order == "vertical_first"
        height, width = (out.shape[2], x.shape[3]) if vertical else (x.shape[2], out.shape[3])
        return [
            _cost(f"{name}.first", layer.first, out.shape[0] * height * width),
            _cost(f"{name}.second", layer.second, out.numel() // out.shape[1]),
        ]
    if isinstance(layer, ConvNorm2d | Downsampler):
        name, layer = f"{name}.conv", layer.conv
    if isinstance(layer, nn.Linear | ExpandedLinear):
        return [_cost(name, layer, out.numel() // layer.out_features)]
    # A transposed convolution puts its kernel at every pixel of its input.
    side = x if isinstance(layer, nn.ConvTranspose2d) else out
    return [_cost(name, layer, side.numel() // side.shape[-3])]


def _cost(name: str, layer: nn.Module, positions: int) -> LayerCost:
    weights = _weights_of(layer)
    return LayerCost(name, weights, weights * positions)


def _weights_of(layer: nn.Module) -> int:
    """Of an expanded layer those of the plain one that it runs as."""
    if isinstance(layer, ExpandedConv2d | Reparam):
        height, width = layer.kernel_size
        return layer.out_channels * layer.in_channels // layer.groups * height * width
    if isinstance(layer, ExpandedLinear):
        return layer.out_features * layer.in_features
    return cast(Tensor, layer.weight).numel()


def measure_cost(
    model: nn.Module,
    image: tuple[int, int, int],
    level: int = 1,
    kept: Mapping[str, int] | None = None,
) -> LevelCost:
    """What a network of torch layers costs for one image, without its latency.

    Args:
        model: a network of torch layers in eval mode on the meta device.
        image: (channels, height, width).
        level: the level to name in the result.
        kept: by the name of a layer with masked weights, how many of them are not masked. Masked
            weights count in no column.

    Raises:
        ValueError: a network that is not on the meta device or is in training mode.
    """
    if model.training or any(p.device.type != "meta" for p in model.parameters()):
        raise ValueError(
            "measure_cost: model must be in eval mode and on the meta device, got another"
        )
    layers, peak = layer_costs(model, image)
    params = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(b.numel() * b.element_size() for b in model.buffers())
    weights = macs = 0
    size = next(model.parameters()).element_size()
    for layer in layers:
        present = layer.weights if kept is None else kept.get(layer.name, layer.weights)
        weights += present
        macs += layer.macs * present // layer.weights
        params -= layer.weights - present
        held -= (layer.weights - present) * size
    return LevelCost(level, params, weights, macs, held, peak)
