"""A small U-Net for segmentation, plain or expanded; widths and plan are ours."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.models.expansion import ExpandableNet, Expansion, expansion_of


def _double(inputs: int, outputs: int, plan: Expansion) -> nn.Sequential:
    """Two 3 x 3 convolutions with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers += [plan.layer(conv), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNetSmall(ExpandableNet):
    """Down to the smallest maps and back up, with the maps of each size handed across.

    Made by :func:`unet_small`. Images of any size: rows and columns of zeros at the bottom and on
    the right make them divisible, and what belongs to them is cut off the result.

    Attributes:
        classes: number of outputs.

    Source: of the form: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical
    Image Segmentation", MICCAI 2015. The widths, padded convolutions, batch norms and the plan of
    expansion are ours: those of the ExpandNets paper are not known to us.
    """

    def __init__(self, plan: Expansion, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.classes: int = config["classes"]
        widths = config["widths"]
        pairs = list(zip((self.in_channels, *widths), widths, strict=False))
        self.down = nn.ModuleList(_double(a, b, plan) for a, b in pairs)
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in steps)
        self.join = nn.ModuleList(_double(2 * b, b, plan) for _, b in steps)
        self.head = nn.Conv2d(widths[0], self.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Labels every pixel.

        Args:
            x: images ``[N, C, H, W]``.

        Returns:
            Logits ``[N, classes, H, W]``.

        Raises:
            ValueError: images of the wrong shape; no image at all in training.
        """
        self.check(x)
        height, width = x.shape[2:]
        whole = 2 ** len(self.up)
        below, right = -height % whole, -width % whole
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        kept: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for up, join, across in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat((across, up(x)), 1))
        x = self.head(x)
        return x[:, :, :height, :width] if below or right else x


def unet_small(
    classes: int = 20,
    in_channels: int = 3,
    *,
    widths: Sequence[int] = (16, 32, 64, 128),
    expand: str | None = None,
    rate: float = 4,
    activation: str | None = None,
    form: str = "auto",
) -> UNetSmall:
    """A small U-Net with fresh weights: half a million parameters.

    Args:
        classes: number of outputs.
        in_channels: of the images.
        widths: channels at the images' size, at a half, a quarter, ...
        expand: ``"cl"``: every 3 x 3 convolution becomes 1 x 1, 3 x 3, 1 x 1 (our plan); ``None``:
            the plain network. The transposed convolutions stay plain.
        rate, activation, form: as in :func:`pyeff.models.smallnet`.

    Raises:
        ValueError: another plan or option; sizes that are not positive.

    Example:
        >>> model = unet_small(4, widths=(8, 16), expand="cl").eval()
        >>> model(torch.rand(1, 3, 31, 50)).shape
        torch.Size([1, 4, 31, 50])
    """
    config: dict[str, Any] = {
        "family": "unet_small",
        "classes": classes,
        "in_channels": in_channels,
        "widths": list(widths),
        "expand": expand,
        "rate": rate,
        "activation": activation,
        "form": form,
    }
    if min((classes, in_channels, *widths)) < 1 or len(widths) < 2:
        raise ValueError(
            "unet_small: classes, in_channels and at least 2 widths must be positive, got "
            f"{classes}, {in_channels} and {list(widths)}"
        )
    plan = expansion_of("unet_small", expand, ("cl",), rate=rate, activation=activation, form=form)
    return UNetSmall(plan, config)
