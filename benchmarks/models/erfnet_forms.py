"""ERFNet in the forms that a user of plain torch could run, with the weights of one of ours.

Part of bench_erfnet.py. ``as_released`` is the network as its authors' code runs it: NCHW, a batch
norm after every pair, each layer its own call. ``folded`` has the norms in the weights before them,
in-place ReLUs and channels_last; ``compiled`` is that through inductor with frozen, packed weights.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.utils import fuse_conv_bn_eval

from pyeff.models import ERFNet
from pyeff.nn import ConvNorm2d, Downsampler, FactorizedConv2d, NonBottleneck1d

Run = Callable[[Tensor], Tensor]


def as_released(model: ERFNet) -> nn.Module:
    """Layer by layer, in NCHW."""
    return PlainERFNet(model, fold=False).eval()


def folded(model: ERFNet) -> nn.Module:
    """Norms folded, channels_last."""
    return PlainERFNet(model, fold=True).eval().to(memory_format=torch.channels_last)


def compiled(model: nn.Module, x: Tensor) -> Run:
    """Through inductor for this shape, with weights as constants that it packs for oneDNN."""
    run: Run = torch.compile(model, dynamic=False)
    with inductor.patch(freezing=True), torch.no_grad():
        for _ in range(2):
            run(x)
    return run


class PlainERFNet(nn.Module):
    """ERFNet of torch layers, for images of a multiple of 8 pixels."""

    def __init__(self, model: ERFNet, fold: bool) -> None:
        super().__init__()
        if model.decoder is None:
            raise ValueError("PlainERFNet: model must have a decoder, got encoder_only")
        *layers, last = [*model.encoder, *model.decoder]
        self.layers = nn.Sequential(*(_plain(layer, fold) for layer in layers))
        self.last = copy.deepcopy(last)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes, H, W]`` of ``x`` ``[N, C, H, W]``."""
        return self.last(self.layers(x))


def _plain(layer: nn.Module, fold: bool) -> nn.Module:
    layer = copy.deepcopy(layer).eval()
    if isinstance(layer, NonBottleneck1d):
        return _Block(layer, fold)
    if isinstance(layer, Downsampler):
        return _Down(layer, fold)
    if isinstance(layer, ConvNorm2d):
        return _Up(layer, fold)
    raise TypeError(f"erfnet_forms: layer must be one of ERFNet's, got {type(layer).__name__}")


class _Pair(nn.Module):
    """Two lines and a norm, or an ordinary convolution and a norm."""

    def __init__(self, pair: FactorizedConv2d | ConvNorm2d, fold: bool) -> None:
        super().__init__()
        dense = isinstance(pair, ConvNorm2d)
        self.first = None if dense else pair.first
        last = pair.conv if dense else pair.second
        norm = pair.norm if dense else pair.norm_outer
        self.last = fuse_conv_bn_eval(last, norm) if fold else last
        self.norm = nn.Identity() if fold else norm
        self.fold = fold

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = F.relu(self.first(x), inplace=self.fold)
        return self.norm(self.last(x))


class _Block(nn.Module):
    def __init__(self, block: NonBottleneck1d, fold: bool) -> None:
        super().__init__()
        self.pair1, self.pair2 = _Pair(block.conv1, fold), _Pair(block.conv2, fold)
        self.fold = fold

    def forward(self, x: Tensor) -> Tensor:
        y = self.pair2(F.relu(self.pair1(x), inplace=self.fold))
        return F.relu(y.add_(x) if self.fold else y + x, inplace=self.fold)


class _Down(nn.Module):
    def __init__(self, down: Downsampler, fold: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.fold = down.conv, down.norm, fold

    def forward(self, x: Tensor) -> Tensor:
        # The norm after a concatenation folds into no convolution; inductor joins it to the rest.
        y = self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2, 2)], 1))
        return F.relu(y, inplace=self.fold)


class _Up(nn.Module):
    def __init__(self, up: ConvNorm2d, fold: bool) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(up.conv, up.norm, transpose=True) if fold else up.conv
        self.norm = nn.Identity() if fold else up.norm
        self.fold = fold

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=self.fold)
