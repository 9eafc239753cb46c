"""DecomposeMe: classifiers made of pairs of one-dimensional convolutions."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.measure import LevelCost, measure_cost
from pyeff.models.residual import global_pool
from pyeff.nn import ConvNorm2d, FactorizedConv2d
from pyeff.nn.factorized_conv2d import NORMS, ORDERS, check_activation

Layer = FactorizedConv2d | ConvNorm2d

# Widths of Dec8's layers, by that of its last four.
DEC8_WIDTHS: dict[int, tuple[int, ...]] = {
    512: (64, 128, 256, 256, 512, 512, 512, 512),
    640: (64, 128, 256, 384, 640, 640, 640, 640),
    768: (64, 128, 256, 384, 768, 768, 768, 768),
}


class DecomposeMe(nn.Module):
    """Pairs of one-dimensional convolutions with ReLUs, poolings, and a linear classifier.

    Attributes:
        layers: the pairs, in running order.
        skips: for the number of a layer, from 1, two more pairs of its width after it, around
            which a shortcut leads.
        pools: numbers of the layers after which the map is halved.
        head: the classifier, on the mean over the positions.
        config: keyword arguments of :func:`pyeff.models.build` that rebuild the network.

    Source: Alvarez, Petersson, "DecomposeMe: Simplifying ConvNets for End-to-End Learning",
    arXiv 1606.05426.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        skips: dict[int, tuple[Layer, Layer]],
        pools: Sequence[int],
        head: nn.Linear,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = nn.ModuleDict({str(at): nn.ModuleList(pair) for at, pair in skips.items()})
        self.pools = frozenset(pools)
        self.head, self.config = head, config
        self.classes: int = config["classes"]
        self.in_channels: int = config["in_channels"]

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, H, W]``, large enough to be halved at every pooling.

        Returns:
            Logits ``[N, classes]``.

        Raises:
            ValueError: images of the wrong shape or too small; no image at all in training.
        """
        smallest = 2 ** len(self.pools)
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < smallest:
            raise ValueError(
                f"DecomposeMe: x must be [N, {self.in_channels}, H, W] with at least {smallest} "
                f"rows and columns, got {list(x.shape)}"
            )
        if self.training and x.shape[0] == 0:
            raise ValueError("DecomposeMe: x must hold an image in training, got none")
        x = x.contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, outer="relu")
            if str(number) in self.skips:
                first, second = cast(nn.ModuleList, self.skips[str(number)])
                x = second(first(x, outer="relu"), residual=x, outer="relu")
            if number in self.pools:
                x = F.max_pool2d(x, 2)
        return self.head(global_pool(x))

    def costs(self, input_size: tuple[int, int] = (224, 224)) -> LevelCost:
        """What one image costs, and what the network weighs.

        Args:
            input_size: (H, W).

        Raises:
            ValueError: a size that is too small.
        """
        # A copy, as compression may have changed the layers.
        model = copy.deepcopy(self).to("meta").eval()
        return measure_cost(model, (self.in_channels, *input_size))


def decomposeme(
    classes: int = 1000,
    width: int | Sequence[int] = 512,
    *,
    skip: bool = False,
    dense: bool = False,
    order: str = "vertical_first",
    inner: str | None = "relu",
    norm: str | None = "both",
    in_channels: int = 3,
    pools: Sequence[int] = (1, 2, 4, 6),
) -> DecomposeMe:
    """Dec8: eight pairs of 3 x 1 and 1 x 3 convolutions and a linear classifier.

    The paper's widths, kernels and poolings are not known to us. This is a network of the same
    form and size: 7.20, 11.12 and 15.18 million parameters for 1000 classes.

    Args:
        classes: number of classes.
        width: of the last four layers: 512, 640 or 768; or the widths of all eight.
        skip: two more pairs after the seventh and the eighth layer, with a shortcut around them
            (ours, after the layers' names in a talk of the authors).
        dense: ordinary 3 x 3 convolutions in place of the pairs: what the network is compared with.
        order: of the members of every pair.
        inner: activation between them; ``None`` makes a pair linear, to measure what it is for.
        norm: where batch norms stand in a pair, as in :class:`~pyeff.nn.FactorizedConv2d`.
        in_channels: of the images.
        pools: numbers of the layers, from 1, after which the map is halved; fewer for small images.

    Raises:
        ValueError: sizes that are not positive, an unknown width, order, activation or norm,
            poolings after layers that there are not.

    Example:
        >>> model = decomposeme(10, width=(8, 8, 16, 16, 32, 32, 32, 32))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if isinstance(width, int) and width not in DEC8_WIDTHS:
        known = ", ".join(map(str, DEC8_WIDTHS))
        raise ValueError(f"decomposeme: width must be {known} or 8 widths, got {width}")
    widths = DEC8_WIDTHS[width] if isinstance(width, int) else tuple(width)
    config: dict[str, Any] = {
        "family": "decomposeme",
        "classes": classes,
        "width": width if isinstance(width, int) else list(width),
        "skip": skip,
        "dense": dense,
        "order": order,
        "inner": inner,
        "norm": norm,
        "in_channels": in_channels,
        "pools": list(pools),
    }
    if len(widths) != 8 or min(widths) < 1:
        raise ValueError(f"decomposeme: width must be 8 positive widths, got {list(widths)}")
    if any(not 1 <= at <= 8 for at in pools) or len(set(pools)) != len(pools):
        raise ValueError(f"decomposeme: pools must be different layers in 1..8, got {list(pools)}")
    _check_options("decomposeme", classes, in_channels, order, norm)
    check_activation("decomposeme", "inner", inner)

    def layer(inputs: int, outputs: int) -> Layer:
        return _layer(inputs, outputs, 3, dense=dense, order=order, inner=inner, norm=norm)

    layers = [layer(a, b) for a, b in zip((in_channels, *widths), widths, strict=False)]
    skips = {}
    if skip:
        skips = {at: (layer(w, w), layer(w, w)) for at, w in ((7, widths[6]), (8, widths[7]))}
    return DecomposeMe(layers, skips, pools, nn.Linear(widths[-1], classes), config)


def dec3(
    width: int = 512,
    classes: int = 36,
    in_channels: int = 1,
    *,
    dense: bool = False,
    order: str = "vertical_first",
    norm: str | None = "both",
) -> DecomposeMe:
    """Dec3: three pairs with long kernels, for characters of 24 x 24 pixels.

    Kernels 9, 9 and 7, a pooling after each layer and the mean before the classifier are ours:
    of the network that was published, three pairs and one linear layer are known to us.

    Args:
        width: channels of every layer.
        classes: number of classes: letters and digits.
        in_channels: of the images.
        dense, order, norm: as in :func:`decomposeme`.

    Raises:
        ValueError: sizes that are not positive, an unknown order or norm.

    Source: Alvarez, Salzmann, "Learning the Number of Neurons in Deep Networks", NIPS 2016, for
    the form; after Jaderberg et al., "Deep Features for Text Spotting", ECCV 2014.

    Example:
        >>> dec3(width=16)(torch.randn(2, 1, 24, 24)).shape
        torch.Size([2, 36])
    """
    config: dict[str, Any] = {
        "family": "dec3",
        "width": width,
        "classes": classes,
        "in_channels": in_channels,
        "dense": dense,
        "order": order,
        "norm": norm,
    }
    if width < 1:
        raise ValueError(f"dec3: width must be positive, got {width}")
    _check_options("dec3", classes, in_channels, order, norm)
    layers = [
        _layer(inputs, width, taps, dense=dense, order=order, inner="relu", norm=norm)
        for inputs, taps in ((in_channels, 9), (width, 9), (width, 7))
    ]
    return DecomposeMe(layers, {}, (1, 2, 3), nn.Linear(width, classes), config)


def _layer(
    inputs: int,
    outputs: int,
    taps: int,
    *,
    dense: bool,
    order: str,
    inner: str | None,
    norm: str | None,
) -> Layer:
    if dense:
        return ConvNorm2d(nn.Conv2d(inputs, outputs, taps, padding=taps // 2))
    return FactorizedConv2d(
        inputs, outputs, taps, padding="same", order=order, inner=inner, norm=norm
    )


def _check_options(
    family: str, classes: int, in_channels: int, order: str, norm: str | None
) -> None:
    """What dense layers would not look at is checked for them too."""
    if classes < 1 or in_channels < 1:
        raise ValueError(
            f"{family}: classes and in_channels must be positive, got {classes} and {in_channels}"
        )
    for name, value, known in (("order", order, ORDERS), ("norm", norm, NORMS)):
        if value not in known:
            allowed = ", ".join(map(repr, known))
            raise ValueError(f"{family}: {name} must be one of {allowed}, got {value!r}")
