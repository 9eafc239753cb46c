"""The backbone of YOLO-LITE, a detector for computers without a GPU; plain or expanded."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of

WIDTHS = (16, 32, 64, 128, 128, 256)
STRIDE = 32
SLOPE = 0.1  # of the leaky ReLU


class YoloLite(ExpandableNet):
    """Six 3 x 3 convolutions with leaky ReLUs, poolings between, and a 1 x 1 convolution.

    Made by :func:`yolo_lite`. It ends with a detector's raw maps; boxes, their loss and their
    training are not part of it.

    Attributes:
        outputs: channels of the result.

    Source: Huang, Pedoeem, Chen, "YOLO-LITE: A Real-Time Object Detection Algorithm Optimized for
    Non-GPU Computers", IEEE Big Data 2018, as we know it. Which of its layers the ExpandNets paper
    expands is not known to us: the plan is ours.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.outputs: int = config["outputs"]
        pairs = zip((self.in_channels, *WIDTHS), WIDTHS, strict=False)
        self.convs = nn.ModuleList(plan.layer(nn.Conv2d(a, b, 3, padding=1)) for a, b in pairs)
        self.head = nn.Conv2d(WIDTHS[-1], self.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to a detector's grid.

        Args:
            x: ``[N, C, H, W]`` with at least 32 rows and columns; 224 x 224 in the paper.

        Returns:
            ``[N, outputs, H // 32, W // 32]``.

        Raises:
            ValueError: images of the wrong shape; no image at all in training.
        """
        self.check(x, STRIDE)
        for number, conv in enumerate(self.convs):
            x = F.leaky_relu(conv(F.max_pool2d(x, 2) if number else x), SLOPE)
        return self.head(x)


def yolo_lite(
    outputs: int = 125,
    in_channels: int = 3,
    *,
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> YoloLite:
    """YOLO-LITE's backbone with fresh weights.

    Args:
        outputs: channels of the result: for 5 boxes a cell and 20 classes 5 * (5 + 20) = 125.
        in_channels: of the images.
        expand: ``"cl"``: every 3 x 3 convolution becomes 1 x 1, 3 x 3, 1 x 1 (our plan); ``None``:
            the plain network.
        rate, activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another plan or option; sizes that are not positive.

    Example:
        >>> yolo_lite(expand="cl").eval()(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 125, 7, 7])
    """
    config: dict[str, Any] = {
        "family": "yolo_lite",
        "outputs": outputs,
        "in_channels": in_channels,
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if min(outputs, in_channels) < 1:
        raise ValueError(
            f"yolo_lite: outputs and in_channels must be positive, got {outputs} and {in_channels}"
        )
    plan = expansion_of("yolo_lite", expand, ("cl",), rate=rate, activation=activation, form=form)
    return YoloLite(plan, config)
