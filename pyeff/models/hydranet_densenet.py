"""Hydra-Dense: a DenseNet for images of CIFAR's size whose last dense block is there n_b times."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.hydranet import HydraNet, class_groups_of
from pyeff.models.hydranet_parts import assemble, check_sizes, scaled


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; the input is kept beside.

    Args:
        inputs: channels.
        growth: channels that are added.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C + growth, H, W]``."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def hydranet_densenet(
    classes: int = 100,
    *,
    n_b: int = 20,
    k: int = 4,
    w_s: float = 1.0,
    w_b: float = 1.0,
    w_g: float = 0.5,
    d: int = 6,
    gate: str = "supervised",
    class_groups: Sequence[int] | None = None,
    gate_depth: int | None = None,
    in_channels: int = 3,
    growth: int = 12,
    input_size: int = 32,
) -> HydraNet:
    """Hydra-Dense: stem = first two dense blocks and their transitions, branches and gate = third.

    Args:
        classes, n_b, k, gate, class_groups, in_channels, input_size: as in
            :func:`~pyeff.models.hydranet_resnet`.
        w_s, w_b, w_g: growth of stem, branches and gate, as factors of ``growth``.
        d: dense layers (1x1 and 3x3 convolution) of each block in stem and branches.
        gate_depth: dense layers of the gate; by default half of ``d``, at least one.
        growth: channels that a layer adds at width 1.

    Raises:
        ValueError: sizes that are not positive, an unknown gate, k out of range, class groups that
            are not one branch for each class.

    Source: Mullapudi et al., "HydraNets", CVPR 2018; Huang et al., "Densely Connected
    Convolutional Networks", CVPR 2017 (bottleneck layers, compression by half). Which layers
    belong to the stem is by analogy with the paper's ImageNet form, and the sizes are ours.

    Example:
        >>> model = hydranet_densenet(10, n_b=5, k=2, d=2)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    config: dict[str, Any] = {
        "family": "hydranet_densenet",
        "classes": classes,
        "n_b": n_b,
        "k": k,
        "w_s": w_s,
        "w_b": w_b,
        "w_g": w_g,
        "d": d,
        "gate": gate,
        "class_groups": class_groups_of(classes, n_b, class_groups),
        "gate_depth": gate_depth,
        "in_channels": in_channels,
        "growth": growth,
        "input_size": input_size,
    }
    gate_depth = max(1, d // 2) if gate_depth is None else gate_depth
    check_sizes("hydranet_densenet", classes=classes, n_b=n_b, d=d, gate_depth=gate_depth)
    check_sizes("hydranet_densenet", w_s=w_s, w_b=w_b, w_g=w_g, growth=growth)
    check_sizes("hydranet_densenet", in_channels=in_channels)
    step = scaled(growth, w_s)
    first = 2 * step
    layers: list[nn.Module] = [nn.Conv2d(in_channels, first, 3, padding=1, bias=False)]
    for _ in range(2):
        layers += _block(first, step, d)
        first += step * d
        layers += _transition(first)
        first //= 2
    template, features = _last(first, scaled(growth, w_b), d)
    body, seen = _last(first, scaled(growth, w_g), gate_depth)
    return assemble((nn.Sequential(*layers), body, template), (seen, features), config)


def _block(inputs: int, growth: int, depth: int) -> list[nn.Module]:
    return [DenseLayer(inputs + i * growth, growth) for i in range(depth)]


def _transition(channels: int) -> list[nn.Module]:
    """To half of the channels, of the height and of the width."""
    conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
    return [nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.AvgPool2d(2)]


def _last(inputs: int, growth: int, depth: int) -> tuple[nn.Module, int]:
    """The third block to the features, and how many these are."""
    features = inputs + depth * growth
    end = [nn.BatchNorm2d(features), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*_block(inputs, growth, depth), *end), features
