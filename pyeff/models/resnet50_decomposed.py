"""ResNet-50*: a pair of one-dimensional convolutions in place of every 3 x 3."""

from collections.abc import Sequence
from typing import cast

from torch import nn

from pyeff.models.resnet import ResNet, build_backbone, initialise
from pyeff.nn import FactorizedConv2d


def resnet50_decomposed(
    classes: int = 1000,
    *,
    inner_norm: bool = False,
    order: str = "vertical_first",
    in_channels: int = 3,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> ResNet:
    """ResNet-50 whose bottlenecks hold 3 x 1, ReLU, 1 x 3 in place of the 3 x 3 convolution.

    21,784,616 parameters for 1000 classes. Where a block halves the map, the 3 x 1 has stride
    (2, 1) and the 1 x 3 stride (1, 2).

    Args:
        classes: number of classes.
        inner_norm: a batch norm between the two as well; 21,792,168 parameters then.
        order: of the two: ``"vertical_first"`` or ``"horizontal_first"``.
        in_channels: of the images.
        widths, depths: other channels and numbers of blocks of the four stages.

    Raises:
        ValueError: sizes that are not positive, an unknown order.

    Source: Alvarez, Salzmann, "Compression-aware Training of Deep Networks", NIPS 2017, for the
    structure; where the strides and norms stand is ours.

    Example:
        >>> model = resnet50_decomposed(10, widths=(8, 16, 32, 64), depths=(1, 1, 1, 1))
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    model = build_backbone(
        "resnet50", classes, in_channels=in_channels, widths=widths, depths=depths
    )
    for block in model.blocks:
        conv = cast(nn.Conv2d, block.conv2)
        block.conv2 = FactorizedConv2d(
            conv.in_channels,
            conv.out_channels,
            3,
            conv.stride,
            1,
            bias=False,
            order=order,
            norm="both" if inner_norm else "outer",
        )
        # The pair has the norm, so that inference folds it.
        block.norm2 = nn.Identity()
    initialise(model)
    model.config = {
        "family": "resnet50_decomposed",
        "classes": classes,
        "inner_norm": inner_norm,
        "order": order,
        "in_channels": in_channels,
        "widths": None if widths is None else list(widths),
        "depths": None if depths is None else list(depths),
    }
    return model
