"""Ways to run the pair relu(norm(1 x 3(relu(3 x 1(x)))) + residual) of ERFNet without pyeff.

Every candidate gets its own best conditions: folded norms, prepacked weights, post-operations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Way = Callable[[], Any]
Pair = tuple[int, int]


class PairTensors(NamedTuple):
    """The arguments of one pair; all of one dtype, maps in channels_last."""

    x: Tensor  # [N, C, H, W]
    w_first: Tensor  # [C, C, 3, 1]
    b_first: Tensor  # [C]
    w_second: Tensor  # [C, C, 1, 3]
    b_second: Tensor  # [C]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    residual: Tensor | None  # [N, C, H, W]

    @property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the second convolution with scale and shift in them."""
        weight = self.w_second * self.scale[:, None, None, None]
        return weight, self.b_second * self.scale + self.shift


def make_pair(
    batch: int, channels: int, height: int, width: int, residual: bool, dtype: torch.dtype
) -> PairTensors:
    """Random tensors; activations keep about the size of x."""

    def image() -> Tensor:
        values = torch.randn(batch, channels, height, width).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    spread = (3 * channels) ** -0.5
    weights = (torch.randn(channels, channels, 3, 1), torch.randn(channels, channels, 1, 3))
    first, second = ((w * spread).to(dtype) for w in weights)
    b_first, b_second, scale, shift = (torch.randn(channels).to(dtype) for _ in range(4))
    added = image() if residual else None
    return PairTensors(image(), first, b_first, second, b_second, scale, shift, added)


def windows(dilation: int) -> tuple[tuple[Pair, Pair], tuple[Pair, Pair]]:
    """Padding and dilation of the vertical and of the horizontal convolution."""
    return ((dilation, 0), (dilation, 1)), ((0, dilation), (1, dilation))


class EagerPair(nn.Module):
    """The pair as ERFNet writes it: two convolutions, a norm, two activations."""

    def __init__(
        self, pair: PairTensors, dilation: int, *, folded: bool, layout: torch.memory_format
    ) -> None:
        super().__init__()
        self.windows = windows(dilation)
        second, b_second = pair.folded if folded else (pair.w_second, pair.b_second)
        weights = (t.detach().clone(memory_format=layout) for t in (pair.w_first, second))
        biases = (t.detach().clone() for t in (pair.b_first, b_second))
        self.w_first, self.w_second = (nn.Parameter(t) for t in weights)
        self.b_first, self.b_second = (nn.Parameter(t) for t in biases)
        self.norm = None if folded else _norm(pair.scale, pair.shift)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """[N, C, H, W]"""
        (p1, d1), (p2, d2) = self.windows
        y = F.relu(F.conv2d(x, self.w_first, self.b_first, padding=p1, dilation=d1))
        y = F.conv2d(y, self.w_second, self.b_second, padding=p2, dilation=d2)
        if self.norm is not None:
            y = self.norm(y)
        return F.relu(y if residual is None else y + residual)


def _norm(scale: Tensor, shift: Tensor) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(scale.shape[0], eps=0.0).to(scale.dtype).eval()
    with torch.no_grad():
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    return norm


def eager_nchw(pair: PairTensors, dilation: int) -> Way:
    """As released: contiguous maps, the norm a module of its own."""
    layout = torch.contiguous_format
    module = EagerPair(pair, dilation, folded=False, layout=layout).eval()
    x = pair.x.contiguous()
    residual = None if pair.residual is None else pair.residual.contiguous()
    return lambda: module(x, residual)


def eager_channels_last(pair: PairTensors, dilation: int) -> Way:
    """The norm folded into the second convolution."""
    layout = torch.channels_last
    module = EagerPair(pair, dilation, folded=True, layout=layout).eval()
    return lambda: module(pair.x, pair.residual)


def prepacked(pair: PairTensors, dilation: int) -> Way:
    """oneDNN with prepacked weights and everything else as its post-operations."""
    (p1, d1), (p2, d2) = windows(dilation)
    second, b_second = pair.folded
    w1, w2 = (_reorder(w, pair.x, p, d) for w, p, d in ((pair.w_first, p1, d1), (second, p2, d2)))
    pointwise = torch.ops.mkldnn._convolution_pointwise
    add = pointwise.binary
    one = [1, 1]

    def run() -> Any:
        middle = pointwise(pair.x, w1, pair.b_first, p1, one, d1, 1, "relu", [], "")
        if pair.residual is None:
            return pointwise(middle, w2, b_second, p2, one, d2, 1, "relu", [], "")
        place = (middle, pair.residual, w2, b_second, p2, one, d2, 1)
        return add(*place, "add", 1.0, "relu", [], "")

    return run


def _reorder(weight: Tensor, x: Tensor, padding: Pair, dilation: Pair) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    shape = list(x.shape)
    packed: Tensor = reorder(weight.to_mkldnn(), padding, (1, 1), dilation, 1, shape)
    return packed


def compiled(pair: PairTensors, dilation: int) -> Way:
    """torch.compile with freezing, which folds the norm and packs the weights."""
    from torch._inductor import config as inductor

    torch.compiler.reset()
    layout = torch.channels_last
    plain = EagerPair(pair, dilation, folded=False, layout=layout).eval()
    module = torch.compile(plain, fullgraph=True)
    with inductor.patch(freezing=True), torch.no_grad():
        module(pair.x, pair.residual)
    return lambda: module(pair.x, pair.residual)
