"""ERFNet: a segmentation network whose blocks are pairs of one-dimensional convolutions."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.measure import LevelCost, measure_cost
from pyeff.nn import Downsampler, NonBottleneck1d, Upsampler
from pyeff.nn.factorized_conv2d import ORDERS
from pyeff.nn.packed_conv_transpose2d import PackedConvTranspose2d

STRIDE = 8  # of the encoder


class ERFNet(nn.Module):
    """An encoder to an eighth of the size and a decoder back to it; made by :func:`erfnet`.

    Images of any size: rows and columns of zeros at the bottom and on the right bring them to a
    multiple of 8, and what belongs to them is cut off the result.

    Attributes:
        encoder: images to maps ``[N, 128, H / 8, W / 8]``; the same with and without a decoder,
            so that a trained encoder's state dict starts a whole network.
        decoder: maps to logits of the images' size; ``None`` with ``encoder_only``.
        head: maps to logits of their own size; only with ``encoder_only``, else ``None``.
        classes: number of outputs.
        config: keyword arguments of :func:`pyeff.models.build` that rebuild the network.

    Source: Romera, Alvarez, Bergasa, Arroyo, "ERFNet: Efficient Residual Factorized ConvNet for
    Real-Time Semantic Segmentation", T-ITS 2018.
    """

    decoder: nn.Sequential | None
    head: nn.Conv2d | None

    def __init__(
        self,
        encoder: nn.Sequential,
        decoder: nn.Sequential | None,
        head: nn.Conv2d | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head, self.config = encoder, decoder, head, config
        self.classes: int = config["classes"]
        self.in_channels: int = config["in_channels"]

    def forward(self, x: Tensor) -> Tensor:
        """Labels every pixel.

        Args:
            x: images ``[N, C, H, W]``; the paper's networks take values in [0, 1].

        Returns:
            Logits ``[N, classes, H, W]``; with ``encoder_only`` of an eighth of the size, rounded
            up.

        Raises:
            ValueError: images of the wrong shape or without pixels; no image at all in training.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < 1:
            raise ValueError(
                f"ERFNet: x must be [N, {self.in_channels}, H, W] with pixels, got {list(x.shape)}"
            )
        if self.training and x.shape[0] == 0:
            raise ValueError("ERFNet: x must hold an image in training, got none")
        height, width = x.shape[2:]
        below, right = -height % STRIDE, -width % STRIDE
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        y = self.encoder(x.contiguous(memory_format=torch.channels_last))
        if self.head is not None:
            return self.head(y)
        if self.decoder is None:
            raise ValueError("ERFNet: decoder must be there where head is not, got neither")
        y = self.decoder(y)
        return y[:, :, :height, :width] if below or right else y

    def costs(self, input_size: tuple[int, int] = (512, 1024)) -> LevelCost:
        """What one image costs, and what the network weighs.

        Args:
            input_size: (H, W).

        Raises:
            ValueError: a size that is not positive.
        """
        if min(input_size) < 1:
            raise ValueError(f"costs: input_size must be positive, got {input_size}")
        # A copy, as compression may have changed the layers.
        model = copy.deepcopy(self).to("meta").eval()
        return measure_cost(model, (self.in_channels, *input_size))


def erfnet(
    classes: int = 20,
    encoder_only: bool = False,
    order: str = "vertical_first",
    in_channels: int = 3,
    *,
    dense: bool = False,
    widths: Sequence[int] = (16, 64, 128),
    dropout: Sequence[float] = (0.03, 0.3),
) -> ERFNet:
    """ERFNet with fresh weights.

    Args:
        classes: number of outputs. Cityscapes has 19 classes, and the public checkpoints one more.
        encoder_only: a 1 x 1 convolution in place of the decoder, for the first stage of training.
        order: of the members of every pair: ``"vertical_first"`` (the PyTorch port) or
            ``"horizontal_first"`` (the Torch code of the papers).
        in_channels: of the images.
        dense: ordinary 3 x 3 convolutions in place of the pairs: what the network is compared with.
        widths: channels at a half, a quarter and an eighth of the size.
        dropout: of the encoder's blocks at a quarter and at an eighth of the size.

    Raises:
        ValueError: sizes that are not positive and rising, an unknown order, probabilities out of
            [0, 1].

    Example:
        >>> model = erfnet(classes=20)
        >>> sum(p.numel() for p in model.parameters())
        2064256
        >>> model.eval()(torch.rand(1, 3, 30, 50)).shape
        torch.Size([1, 20, 30, 50])
    """
    config: dict[str, Any] = {
        "family": "erfnet",
        "classes": classes,
        "encoder_only": encoder_only,
        "order": order,
        "in_channels": in_channels,
        "dense": dense,
        "widths": list(widths),
        "dropout": list(dropout),
    }
    if classes < 1:
        raise ValueError(f"erfnet: classes must be positive, got {classes}")
    if len(widths) != 3 or not 1 <= in_channels < widths[0] < widths[1] < widths[2]:
        raise ValueError(
            f"erfnet: widths must be 3 rising ints above in_channels {in_channels}, "
            f"got {list(widths)}"
        )
    if order not in ORDERS:
        raise ValueError(
            f"erfnet: order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}"
        )
    if len(dropout) != 2:
        raise ValueError(f"erfnet: dropout must be 2 probabilities, got {list(dropout)}")
    half, quarter, eighth = widths

    def block(channels: int, probability: float = 0.0, dilation: int = 1) -> NonBottleneck1d:
        return NonBottleneck1d(channels, probability, dilation, order, dense=dense)

    encoder = nn.Sequential(
        Downsampler(in_channels, half),
        Downsampler(half, quarter),
        *(block(quarter, dropout[0]) for _ in range(5)),
        Downsampler(quarter, eighth),
        *(block(eighth, dropout[1], dilation) for dilation in (2, 4, 8, 16) * 2),
    )
    if encoder_only:
        return ERFNet(encoder, None, nn.Conv2d(eighth, classes, 1), config)
    decoder = nn.Sequential(
        Upsampler(eighth, quarter),
        block(quarter),
        block(quarter),
        Upsampler(quarter, half),
        block(half),
        block(half),
        PackedConvTranspose2d(half, classes, 2, 2),
    )
    return ERFNet(encoder, decoder, None, config)
