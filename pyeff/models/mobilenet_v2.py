"""MobileNetV2: inverted residuals with linear bottlenecks, plain or expanded."""

from typing import Any

import torch
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of
from pyeff.models.residual import global_pool

STEM, LAST = 32, 1280
# Ratio of the hidden width, output channels, blocks and the first one's stride, for each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth smaller."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _unit(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """A 1 x 1 convolution to more channels, a 3 x 3 depth-wise one, and a linear 1 x 1.

    Args:
        inputs, outputs: channels.
        stride: of the depth-wise convolution.
        ratio: hidden channels over inputs; with 1 there is no first convolution.
        plan: of the network; it expands the depth-wise convolution of a block with stride 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int, plan: Expansion) -> None:
        super().__init__()
        hidden = inputs * ratio
        self.shortcut = stride == 1 and inputs == outputs
        depthwise: nn.Module = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        if stride == 2:
            depthwise = plan.layer(
                nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
            )
        wider = [_unit(nn.Conv2d(inputs, hidden, 1, bias=False), hidden)] if ratio > 1 else []
        self.conv = nn.Sequential(
            *wider,
            _unit(depthwise, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        y = self.conv(x)
        return x + y if self.shortcut else y


class MobileNetV2(ExpandableNet):
    """A stem, seventeen inverted residuals and a linear layer; made by :func:`mobilenet_v2`.

    Its parameters have the names of torchvision's, so that state dicts of the plain network fit.

    Attributes:
        classes: number of outputs.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
    table 2.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.classes: int = config["classes"]
        width = config["width"]
        inputs, last = _multiple_of_8(STEM * width), _multiple_of_8(LAST * max(1.0, width))
        stem = plan.layer(nn.Conv2d(self.in_channels, inputs, 3, 2, 1, bias=False))
        features: list[nn.Module] = [_unit(stem, inputs)]
        for ratio, channels, blocks, first in STAGES:
            outputs = _multiple_of_8(channels * width)
            for number in range(blocks):
                stride = 1 if number else first
                features.append(InvertedResidual(inputs, outputs, stride, ratio, plan))
                inputs = outputs
        features.append(_unit(nn.Conv2d(inputs, last, 1, bias=False), last))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, self.classes))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The released code's: by the outgoing connections, members of chains as any other."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                outgoing = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / outgoing) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

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
        return self.classifier(global_pool(self.features(x)))


def mobilenet_v2(
    classes: int = 1000,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> MobileNetV2:
    """MobileNetV2 with fresh weights: 3.50 million parameters for 1000 classes.

    Args:
        classes: number of classes.
        in_channels: of the images.
        width: of all layers, over the paper's; widths are rounded to multiples of 8.
        expand: ``"cl"``: the stem and the depth-wise convolutions of the four blocks with stride 2
            become 1 x 1, 3 x 3, 1 x 1 (the plan of ExpandNets); ``None``: the plain network.
        rate, activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another plan or option; sizes that are not positive.

    Source: of the plan: Guo, Alvarez, Salzmann, "ExpandNets", NeurIPS 2020, and its released code.

    Example:
        >>> model = mobilenet_v2(10, width=0.25, expand="cl").eval()
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    config: dict[str, Any] = {
        "family": "mobilenet_v2",
        "classes": classes,
        "in_channels": in_channels,
        "width": width,
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if min(classes, in_channels) < 1 or width <= 0:
        raise ValueError(
            "mobilenet_v2: classes, in_channels and width must be positive, got "
            f"{classes}, {in_channels} and {width}"
        )
    plan = expansion_of(
        "mobilenet_v2", expand, ("cl",), rate=rate, activation=activation, form=form
    )
    return MobileNetV2(plan, config)
