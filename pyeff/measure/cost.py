"""Counting what a network of plain torch layers costs, without running its arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyeff.measure.memory import peak_activation_bytes


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
    """Counts a network of torch layers in one pass on the meta device.

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
            weight = cast(Tensor, layer.weight)
            positions = out.numel() // weight.shape[0]
            found.append(LayerCost(name, weight.numel(), weight.numel() * positions))

        return count

    handles: list[RemovableHandle] = [
        layer.register_forward_hook(counter(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    dtype = next(model.parameters()).dtype
    x = torch.empty(1, *image, device="meta", dtype=dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    try:
        peak = peak_activation_bytes(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found, peak


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
