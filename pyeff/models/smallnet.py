"""SmallNet: the small classifier of the ExpandNets paper, plain or with expanded layers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.measure import LevelCost
from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of

WIDTHS = (8, 16, 32)
HIDDEN = 64
# What expand may be. There is no smaller odd kernel that 3 x 3 is made of.
PLANS = {3: ("fc", "cl", "cl+fc"), 7: ("fc", "cl", "ck", "cl+fc", "ck+fc")}


class SmallNet(ExpandableNet):
    """Three convolutions, each with batch norm, ReLU and a pooling, and two linear layers.

    Made by :func:`smallnet`. The paper's plan expands the three convolutions, ``fc1``, or both; the
    layer of the logits stays plain.

    Attributes:
        image_size: rows and columns of the images.
        classes: number of outputs.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020, and its released code.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        kernel, size, inputs = config["kernel"], config["image_size"], config["in_channels"]
        self.image_size: int = size
        self.classes: int = config["classes"]
        padding = 0 if kernel == 3 else kernel // 2
        first, second, third = WIDTHS
        # The published code does not widen the image's own channels.
        self.conv1 = plan.layer(nn.Conv2d(inputs, first, kernel, padding=padding), first=inputs)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = plan.layer(nn.Conv2d(first, second, kernel, padding=padding))
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = plan.layer(nn.Conv2d(second, third, kernel, padding=padding))
        self.norm3 = nn.BatchNorm2d(third)
        for _ in WIDTHS:
            size = (size + 2 * padding - kernel + 1) // 2
        if size < 1:
            raise ValueError(
                f"smallnet: image_size must leave a pixel after three poolings with kernel "
                f"{kernel}, got {self.image_size}"
            )
        self.fc1 = plan.dense(nn.Linear(third * size**2, HIDDEN))
        self.fc2 = nn.Linear(HIDDEN, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, image_size, image_size]``.

        Returns:
            Logits ``[N, classes]``.

        Raises:
            ValueError: images of another shape; no image at all in training.
        """
        self.check(x)
        if tuple(x.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"SmallNet: x must have {self.image_size} rows and columns, got {list(x.shape)}"
            )
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))

    def costs(self, input_size: tuple[int, int] | None = None) -> LevelCost:
        """What one image costs at run time, where every linear chain is the one layer it equals.

        Args:
            input_size: (H, W), which must be the images' own; the default.

        Raises:
            ValueError: another size.
        """
        return super().costs(input_size or (self.image_size, self.image_size))


def smallnet(
    classes: int = 10,
    kernel: int = 7,
    in_channels: int = 3,
    *,
    image_size: int = 32,
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> SmallNet:
    """SmallNet with fresh weights: 66 186 parameters with kernel 7, 15 050 with kernel 3.

    Args:
        classes: number of classes.
        kernel: side of the convolutions' kernels: 3 (without padding) or 7 (padded by 3).
        in_channels: of the images.
        image_size: rows and columns of the images; 32 in the paper.
        expand: which layers are chains in training: ``"cl"`` (convolutions as 1 x 1, k x k,
            1 x 1), ``"ck"`` (as 3 x 3 convolutions; kernel 7 only), ``"fc"`` (the linear layer
            ``fc1`` as three), ``"cl+fc"``, ``"ck+fc"``, or ``None``: the plain network.
        rate: widths of the chains over those of the plain layers (the paper's r).
        activation: ``"relu"`` between a chain's members: the non-linear network whose weights start
            the linear one in the paper's "+Init". It cannot be contracted.
        form: how a chain runs in training: ``"expanded"``, ``"contracted"`` or ``"auto"``, see
            :class:`pyeff.nn.ExpandedConv2d`.

    Raises:
        ValueError: another kernel, plan or option; sizes that are not positive; images that are
            too small.

    Example:
        >>> model = smallnet(expand="ck")
        >>> sum(p.numel() for p in model.parameters())
        186982
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.costs().params
        66186
    """
    config: dict[str, Any] = {
        "family": "smallnet",
        "classes": classes,
        "kernel": kernel,
        "in_channels": in_channels,
        "image_size": image_size,
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if kernel not in PLANS:
        raise ValueError(f"smallnet: kernel must be 3 or 7, got {kernel}")
    if min(classes, in_channels, image_size) < 1:
        raise ValueError(
            "smallnet: classes, in_channels and image_size must be positive, got "
            f"{classes}, {in_channels} and {image_size}"
        )
    plan = expansion_of(
        "smallnet", expand, PLANS[kernel], rate=rate, activation=activation, form=form
    )
    return SmallNet(plan, config)
