"""Blocks of parallel branches that contract: RepVGG, ACNet, diverse branches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyeff.nn.reparam import Reparam
from pyeff.nn.reparam_branches import ConvBranch, IdentityBranch, PointBranch, Window


class RepVGGBlock(Reparam):
    """The whole kernel, its middle and the identity, each with a batch norm, added up.

    ``norm(conv(x)) + norm(conv1x1(x)) + norm(x)``; the identity where the stride is 1 and as many
    channels come out as go in. The paper's kernel is 3 x 3, and its ReLU comes after the block.

    Args:
        see :class:`Reparam`.

    Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021.

    Example:
        >>> block = RepVGGBlock(8, 8, 3, padding=1)
        >>> block.contract()
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def _branches(self, window: Window, made: Mapping[str, Any]) -> dict[str, nn.Module]:
        branches: dict[str, nn.Module] = {
            "conv": ConvBranch(window, window.kernel_size, **made),
            "point": ConvBranch(window, (1, 1), **made),
        }
        if window.stride == (1, 1) and window.in_channels == window.out_channels:
            branches["identity"] = IdentityBranch(window, **made)
        return branches


class ACBlock(Reparam):
    """The whole kernel, its middle column and its middle row, each with a batch norm, added up.

    Args:
        see :class:`Reparam`.

    Source: Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric
    Convolution Blocks", ICCV 2019.

    Example:
        >>> ACBlock(8, 16, 3, stride=2, padding=1)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 3, 3])
    """

    def _branches(self, window: Window, made: Mapping[str, Any]) -> dict[str, nn.Module]:
        height, width = window.kernel_size
        return {
            "conv": ConvBranch(window, (height, width), **made),
            "column": ConvBranch(window, (height, 1), **made),
            "row": ConvBranch(window, (1, width), **made),
        }


class DiverseBranchBlock(Reparam):
    """Four branches: the whole kernel; its middle; 1 x 1, then the whole; 1 x 1, then an average.

    A batch norm follows every layer. Of the paper's six transforms the block uses all: norms are
    folded, branches added, 1 x 1 and k x k convolutions composed (groups beside each other), an
    average is a kernel, small kernels are padded.

    Args:
        inner_channels: of the map between the 1 x 1 and the k x k convolution; ``in_channels`` by
            default, whose 1 x 1 starts as the identity.
        others: see :class:`Reparam`. Every 1 x 1 convolution has the block's groups.

    Raises:
        ValueError: as :class:`Reparam`; inner channels that the groups do not divide.

    Source: Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit",
    CVPR 2021.

    Example:
        >>> block = DiverseBranchBlock(4, 6, 3, padding=1).double()
        >>> _ = block(torch.randn(8, 4, 5, 5).double())  # moves the statistics
        >>> conv, x = block.eval().contract(), torch.randn(1, 4, 5, 5).double()
        >>> torch.allclose(conv(x), block(x))
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...] = 3,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        inner_channels: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        self.inner_channels = in_channels if inner_channels is None else inner_channels
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            device,
            dtype,
            norm_eps=norm_eps,
        )

    def _branches(self, window: Window, made: Mapping[str, Any]) -> dict[str, nn.Module]:
        if self.inner_channels < 1 or self.inner_channels % window.groups:
            raise ValueError(
                f"{self._op}: inner_channels must be a positive multiple of groups, got "
                f"{self.inner_channels} in {window.groups} groups"
            )
        twice = PointBranch(window, self.inner_channels, **made)
        if self.inner_channels == window.in_channels:
            nn.init.dirac_(twice.point.weight, window.groups)
        return {
            "conv": ConvBranch(window, window.kernel_size, **made),
            "point": ConvBranch(window, (1, 1), **made),
            "point_conv": twice,
            "point_average": PointBranch(window, None, **made),
        }
