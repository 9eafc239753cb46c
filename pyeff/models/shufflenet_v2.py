"""ShuffleNetV2 at half the width: split, convolve one half, shuffle; plain or expanded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of
from pyeff.models.residual import global_pool

STEM, LAST = 24, 1024
# Output channels and units of each stage; the first unit of a stage halves the map.
STAGES = ((48, 4), (96, 8), (192, 4))


def _depthwise(channels: int, stride: int, plan: Expansion) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [plan.layer(conv), nn.BatchNorm2d(channels)]


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class ShuffleUnit(nn.Module):
    """One half of the channels goes through three convolutions, then the halves are interleaved.

    Args:
        inputs, outputs: channels; both even.
        stride: 2 halves the map, and both halves of the outputs come of all inputs.
        plan: of the network; it expands the depth-wise convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, plan: Expansion) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(*_depthwise(inputs, 2, plan), *_pointwise(inputs, half))
        self.branch2 = nn.Sequential(
            *_pointwise(inputs if stride == 2 else half, half),
            *_depthwise(half, stride, plan),
            *_pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        if self.stride == 2:
            first, second = self.branch1(x), self.branch2(x)
        else:
            first, second = x.chunk(2, dim=1)
            second = self.branch2(second)
        # Channels of the halves in turn.
        return torch.stack((first, second), dim=2).flatten(1, 2)


class ShuffleNetV2(ExpandableNet):
    """A stem, three stages and a linear layer; made by :func:`shufflenet_v2_x0_5`.

    Its parameters have the names of torchvision's, so that state dicts of the plain network fit.

    Attributes:
        classes: number of outputs.

    Source: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", ECCV 2018, table 5.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.classes: int = config["classes"]
        stem = nn.Conv2d(self.in_channels, STEM, 3, 2, 1, bias=False)
        self.conv1 = nn.Sequential(plan.layer(stem), nn.BatchNorm2d(STEM), nn.ReLU())
        stages, inputs = [], STEM
        for outputs, units in STAGES:
            first = ShuffleUnit(inputs, outputs, 2, plan)
            rest = (ShuffleUnit(outputs, outputs, 1, plan) for _ in range(units - 1))
            stages.append(nn.Sequential(first, *rest))
            inputs = outputs
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = nn.Sequential(*_pointwise(inputs, LAST))
        self.fc = nn.Linear(LAST, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, H, W]``; 224 x 224 in the paper.

        Returns:
            Logits ``[N, classes]``.

        Raises:
            ValueError: images of the wrong shape; no image at all in training.
        """
        self.check(x)
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(global_pool(x))


def shufflenet_v2_x0_5(
    classes: int = 1000,
    in_channels: int = 3,
    *,
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> ShuffleNetV2:
    """ShuffleNetV2 0.5x with fresh weights: 1.37 million parameters for 1000 classes.

    Args:
        classes: number of classes.
        in_channels: of the images.
        expand: ``"cl"``: the stem and every depth-wise convolution become 1 x 1, 3 x 3, 1 x 1 (the
            plan of ExpandNets); ``None``: the plain network.
        rate, activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another plan or option; sizes that are not positive.

    Source: of the plan: Guo, Alvarez, Salzmann, "ExpandNets", NeurIPS 2020, and its released code.

    Example:
        >>> model = shufflenet_v2_x0_5(10, expand="cl").eval()
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    config: dict[str, Any] = {
        "family": "shufflenet_v2_x0_5",
        "classes": classes,
        "in_channels": in_channels,
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if min(classes, in_channels) < 1:
        raise ValueError(
            "shufflenet_v2_x0_5: classes and in_channels must be positive, got "
            f"{classes} and {in_channels}"
        )
    plan = expansion_of(
        "shufflenet_v2_x0_5", expand, ("cl",), rate=rate, activation=activation, form=form
    )
    return ShuffleNetV2(plan, config)
