"""MobileNetV1: depth-wise and point-wise convolutions in turn, plain or expanded."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of
from pyeff.models.residual import global_pool

STEM = 32
# Output channels and stride of each of the 13 blocks.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class SeparableBlock(nn.Module):
    """A 3 x 3 depth-wise and a 1 x 1 convolution, each with batch norm and ReLU.

    Args:
        inputs, outputs: channels.
        stride: of the depth-wise convolution, which the plan expands.
        plan: of the network.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, plan: Expansion) -> None:
        super().__init__()
        self.depthwise = plan.layer(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        )
        self.norm1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        x = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(x)))


class MobileNetV1(ExpandableNet):
    """A stem, thirteen separable blocks and a linear layer; made by :func:`mobilenet_v1`.

    Attributes:
        classes: number of outputs.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications", arXiv 1704.04861, table 1.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.classes: int = config["classes"]

        def scaled(channels: int) -> int:
            return max(8, int(channels * config["width"]))

        inputs = scaled(STEM)
        self.stem = plan.layer(nn.Conv2d(self.in_channels, inputs, 3, 2, 1, bias=False))
        self.norm = nn.BatchNorm2d(inputs)
        blocks = []
        for outputs, stride in BLOCKS:
            blocks.append(SeparableBlock(inputs, scaled(outputs), stride, plan))
            inputs = scaled(outputs)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, self.classes)

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
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(global_pool(x))


def mobilenet_v1(
    classes: int = 1000,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> MobileNetV1:
    """MobileNetV1 with fresh weights: 4.23 million parameters for 1000 classes.

    Args:
        classes: number of classes.
        in_channels: of the images.
        width: of all layers, over the paper's.
        expand: ``"cl"``: the stem and all thirteen depth-wise convolutions become 1 x 1, 3 x 3,
            1 x 1 (the plan of ExpandNets; point-wise convolutions stay); ``None``: the plain
            network.
        rate, activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another plan or option; sizes that are not positive.

    Source: of the plan: Guo, Alvarez, Salzmann, "ExpandNets", NeurIPS 2020, and its released code.

    Example:
        >>> model = mobilenet_v1(10, width=0.25, expand="cl").eval()
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    config: dict[str, Any] = {
        "family": "mobilenet_v1",
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
            "mobilenet_v1: classes, in_channels and width must be positive, got "
            f"{classes}, {in_channels} and {width}"
        )
    plan = expansion_of(
        "mobilenet_v1", expand, ("cl",), rate=rate, activation=activation, form=form
    )
    return MobileNetV1(plan, config)
