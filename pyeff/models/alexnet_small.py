"""The AlexNet-like classifier of the first ExpandNets paper, with large kernels to expand."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of
from pyeff.models.residual import global_pool

SIZES = (128, 256, 512)
# Below it, nothing is left after the last pooling.
SMALLEST = 63


class AlexNetSmall(ExpandableNet):
    """Five convolutions and one linear layer; made by :func:`alexnet_small`.

    Attributes:
        classes: number of outputs.

    Source: kernels of the first two layers and all widths: Guo, Alvarez, Salzmann, "Expand
    Nets: Exploiting Linear Redundancy to Train Small Networks", arXiv 1811.10495, 2018. Strides and
    poolings are those of torchvision's AlexNet; the batch norms, and a mean over the positions in
    front of one linear layer, are ours.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.classes: int = config["classes"]
        n = config["n"]
        layers = [
            nn.Conv2d(config["in_channels"], 64, 11, 4, 2, bias=False),
            nn.Conv2d(64, 192, 5, padding=2, bias=False),
            nn.Conv2d(192, 384, 3, padding=1, bias=False),
            nn.Conv2d(384, n, 3, padding=1, bias=False),
            nn.Conv2d(n, n, 3, padding=1, bias=False),
        ]
        self.convs = nn.ModuleList(plan.layer(layer) for layer in layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for layer in layers)
        self.head = nn.Linear(n, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, H, W]`` with at least 63 rows and columns; 224 in the paper.

        Returns:
            Logits ``[N, classes]``.

        Raises:
            ValueError: images of the wrong shape; no image at all in training.
        """
        self.check(x, SMALLEST)
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = F.relu(norm(conv(x)))
            if number in (1, 2, 5):
                x = F.max_pool2d(x, 3, 2)
        return self.head(global_pool(x))


def alexnet_small(
    classes: int = 1000,
    n: int = 256,
    in_channels: int = 3,
    *,
    expand: str | None = None,
    rate: float = 2,
    activation: str | None = None,
    form: str = "auto",
) -> AlexNetSmall:
    """An AlexNet-like network with fresh weights, widths 64 - 192 - 384 - n - n.

    Args:
        classes: number of classes.
        n: channels of the last two convolutions: 128, 256 or 512.
        in_channels: of the images.
        expand: ``"ck"``: the 11 x 11 convolution becomes five 3 x 3 with 6, 128, 128 and 128
            channels between, the 5 x 5 two (the paper's plan); ``"cl"``: every convolution
            becomes 1 x 1, k x k, 1 x 1 (ours); ``None``: the plain network.
        rate: widths of the chains over those of the plain layers; 2 in the paper.
        activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another n, plan or option; sizes that are not positive.

    Example:
        >>> model = alexnet_small(10, n=128, expand="ck")
        >>> [member.out_channels for member in model.convs[0].members]
        [6, 128, 128, 128, 64]
    """
    config: dict[str, Any] = {
        "family": "alexnet_small",
        "classes": classes,
        "n": n,
        "in_channels": in_channels,
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if n not in SIZES:
        raise ValueError(f"alexnet_small: n must be 128, 256 or 512, got {n}")
    if min(classes, in_channels) < 1:
        raise ValueError(
            "alexnet_small: classes and in_channels must be positive, got "
            f"{classes} and {in_channels}"
        )
    plan = expansion_of(
        "alexnet_small", expand, ("ck", "cl"), rate=rate, activation=activation, form=form
    )
    return AlexNetSmall(plan, config)
