"""The branches of a re-parameterised convolution: what each computes, and which kernel that is."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.contraction import Kernel, compose, identity_kernel, scale_outputs
from pyeff.nn.folding import norm_affine

Pair = tuple[int, int]


class Window(NamedTuple):
    """The convolution that a block contracts to, zeros around its input.

    Attributes:
        in_channels, out_channels, groups: as in ``nn.Conv2d``.
        kernel_size, stride, padding, dilation: likewise, one number an axis.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def inset(self, size: Pair) -> Pair:
        """How far inside the padded input a smaller kernel in the middle begins; less than 0: out.

        The middle of the window stays in place: a kernel with less taps needs less padding.
        """
        rows, columns = (
            spread * ((whole - part) // 2) - edge
            for whole, part, spread, edge in zip(
                self.kernel_size, size, self.dilation, self.padding, strict=True
            )
        )
        return rows, columns


def fold_norm(kernel: Kernel, norm: nn.BatchNorm2d) -> Kernel:
    """A kernel followed by a batch norm in eval mode, in float64.

    Args:
        kernel: in float64.
        norm: of its outputs.

    Raises:
        ValueError: a norm without running statistics.
    """
    return scale_outputs(kernel, *norm_affine(norm, torch.float64))


class Branch(nn.Module):
    """One of the linear maps whose sum a block is.

    Args:
        window: what the block contracts to.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def folded(self) -> Kernel:
        """What the branch is in eval mode, in float64; the middle of the window's kernel."""
        raise NotImplementedError("Branch: folded is what a subclass brings")


class ConvBranch(Branch):
    """A convolution of the whole kernel or of its middle, and a batch norm.

    Args:
        window: what the block contracts to.
        size: of the kernel; odd, no larger than the window's.
        eps: of the batch norm.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        window: Window,
        size: Pair,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(window)
        inset = window.inset(size)
        self.crop: Pair = (max(inset[0], 0), max(inset[1], 0))
        self.conv = nn.Conv2d(
            window.in_channels,
            window.out_channels,
            size,
            window.stride,
            (max(-inset[0], 0), max(-inset[1], 0)),
            window.dilation,
            window.groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.BatchNorm2d(window.out_channels, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, O, H', W']``."""
        rows, columns = self.crop
        if rows or columns:
            x = F.pad(x, (-columns, -columns, -rows, -rows))
        result: Tensor = self.norm(self.conv(x))
        return result

    def folded(self) -> Kernel:
        """As in :class:`Branch`."""
        return fold_norm(Kernel.of(self.conv, torch.float64), self.norm)


class IdentityBranch(Branch):
    """The input itself, and a batch norm.

    Args:
        window: of stride 1, with as many channels out as in.
        eps: of the batch norm.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        window: Window,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(window)
        self.norm = nn.BatchNorm2d(window.out_channels, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C, H', W']``."""
        rows, columns = self.window.inset((1, 1))
        if rows or columns:
            x = F.pad(x, (-columns, -columns, -rows, -rows))
        result: Tensor = self.norm(x)
        return result

    def folded(self) -> Kernel:
        """As in :class:`Branch`."""
        like = Kernel(self.norm.weight.double(), groups=self.window.groups)
        return fold_norm(identity_kernel(like, self.norm.num_features), self.norm)


class PointBranch(Branch):
    """1 x 1 convolution, batch norm, then a convolution or an average of the whole kernel, and its
    batch norm.

    The map in the middle is padded with what the first norm makes of a zero, not with zeros: only
    then is the whole one convolution, at the borders too.

    Args:
        window: what the block contracts to.
        inner_channels: of the map in the middle, a multiple of the groups; ``None``: an average
            follows, which has as many channels as the block puts out.
        eps: of the batch norms.
        device, dtype: of the parameters.

    Source: Ding et al., "Diverse Branch Block", CVPR 2021.
    """

    def __init__(
        self,
        window: Window,
        inner_channels: int | None,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(window)
        inner = window.out_channels if inner_channels is None else inner_channels
        self.point = nn.Conv2d(
            window.in_channels,
            inner,
            1,
            groups=window.groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.point_norm = nn.BatchNorm2d(inner, eps, device=device, dtype=dtype)
        self.conv: nn.Conv2d | None = None
        if inner_channels is not None:
            self.conv = nn.Conv2d(
                inner,
                window.out_channels,
                window.kernel_size,
                window.stride,
                0,
                window.dilation,
                window.groups,
                bias=False,
                device=device,
                dtype=dtype,
            )
        self.norm = nn.BatchNorm2d(window.out_channels, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, O, H', W']``."""
        y = self._padded(self.point_norm(self.point(x)))
        y = self._average(y) if self.conv is None else self.conv(y)
        result: Tensor = self.norm(y)
        return result

    def _padded(self, y: Tensor) -> Tensor:
        rows, columns = self.window.padding
        if not (rows or columns):
            return y
        edges = (columns, columns, rows, rows)
        outside = 1 - F.pad(torch.ones_like(y[:1, :1]), edges)
        shift = norm_affine(self.point_norm)[1].to(y.dtype)
        return F.pad(y, edges) + shift[:, None, None] * outside

    def _average(self, y: Tensor) -> Tensor:
        window = self.window
        if window.dilation == (1, 1):
            return F.avg_pool2d(y, window.kernel_size, window.stride)
        channels = y.shape[1]
        kernel = self._average_kernel(y, channels, channels).weight
        return F.conv2d(y, kernel, None, window.stride, 0, window.dilation, channels)

    def _average_kernel(self, like: Tensor, channels: int, groups: int) -> Kernel:
        window = self.window
        one = Kernel(like, None, window.stride, window.dilation, groups)
        kernel = identity_kernel(one, channels)
        rows, columns = window.kernel_size
        weight = (kernel.weight / (rows * columns)).expand(-1, -1, rows, columns)
        return replace(kernel, weight=weight, dilation=window.dilation)

    def folded(self) -> Kernel:
        """As in :class:`Branch`."""
        point = fold_norm(Kernel.of(self.point, torch.float64), self.point_norm)
        if self.conv is None:
            second = self._average_kernel(point.weight, point.shape[0], point.groups)
        else:
            second = Kernel.of(self.conv, torch.float64)
        return fold_norm(compose(point, second), self.norm)
