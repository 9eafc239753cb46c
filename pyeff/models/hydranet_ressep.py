"""ResSep HydraNet: residual blocks of separable convolutions, for ImageNet."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.hydranet import HydraNet, class_groups_of
from pyeff.models.hydranet_parts import assemble, check_sizes, scaled


class SeparableConv(nn.Module):
    """3x3 depth-wise convolution, 1x1 convolution, norm.

    Args:
        inputs, outputs: channels.
        stride: of the depth-wise convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        return self.norm(self.pointwise(self.depthwise(x)))


class SeparableBlock(nn.Module):
    """d units of two separable convolutions each, and a separable convolution beside them.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution and of the one beside.
        depth: number of units d.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * (2 * depth)
        self.convs = nn.ModuleList(
            SeparableConv(sizes[i], sizes[i + 1], stride if i == 0 else 1) for i in range(2 * depth)
        )
        self.shortcut = SeparableConv(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(y if i == 0 else F.relu(y))
        return F.relu(y + self.shortcut(x))


def hydranet_ressep(
    classes: int = 1000,
    *,
    n_b: int = 50,
    k: int = 2,
    w_s: float = 0.5,
    w_b: float = 0.125,
    w_g: float = 0.125,
    d: int = 2,
    gate: str = "supervised",
    class_groups: Sequence[int] | None = None,
    in_channels: int = 3,
    input_size: int = 224,
) -> HydraNet:
    """ResSep: 3x3 convolution and pooling, three blocks as the stem, block 4 as branches and gate.

    Args:
        classes, n_b, k, gate, class_groups, in_channels, input_size: as in
            :func:`~pyeff.models.hydranet_resnet`.
        w_s: width of the stem's blocks, as a factor of 128, 256 and 512 channels.
        w_b, w_g: width of branches and gate, as a factor of 1024 channels.
        d: how often a block's two separable convolutions are stacked.

    Raises:
        ValueError: sizes that are not positive, an unknown gate, k out of range, class groups that
            are not one branch for each class.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, figure 2a; widths after public code that
    follows it. 221, 234 and 258 million multiply-adds at k 2, 4 and 8, 13.0 million weights.

    Example:
        >>> model = hydranet_ressep()
        >>> [round(model.costs(k=k).macs / 1e6) for k in (2, 4, 8)]
        [221, 234, 258]
    """
    config: dict[str, Any] = {
        "family": "hydranet_ressep",
        "classes": classes,
        "n_b": n_b,
        "k": k,
        "w_s": w_s,
        "w_b": w_b,
        "w_g": w_g,
        "d": d,
        "gate": gate,
        "class_groups": class_groups_of(classes, n_b, class_groups),
        "in_channels": in_channels,
        "input_size": input_size,
    }
    check_sizes("hydranet_ressep", classes=classes, n_b=n_b, d=d, in_channels=in_channels)
    check_sizes("hydranet_ressep", w_s=w_s, w_b=w_b, w_g=w_g)
    widths = [64, *(scaled(width, w_s) for width in (128, 256, 512))]
    stem = nn.Sequential(
        nn.Conv2d(in_channels, 64, 3, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(SeparableBlock(widths[i], widths[i + 1], 1 if i == 0 else 2, d) for i in range(3)),
    )
    branch, body = scaled(1024, w_b), scaled(1024, w_g)
    return assemble(
        (stem, _last(widths[3], body, d), _last(widths[3], branch, d)), (body, branch), config
    )


def _last(inputs: int, outputs: int, depth: int) -> nn.Module:
    """Block 4, down to its features."""
    block = SeparableBlock(inputs, outputs, 2, depth)
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
