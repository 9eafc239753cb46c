"""Convolutions side by side, of which every image runs k."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyeff.ops.branch_conv2d import branch_conv2d
from pyeff.ops.top_k_routes import Routes


class BranchConv2d(nn.Module):
    """B convolutions of one shape; every image runs those that its routes name.

    Row (n, j) of the result is ``conv2d(x[n], weight[b], bias[b])`` with
    ``b = routes.index[n, j]``. The weights lie in one tensor ``[B, O, C / groups, kh, kw]``; each
    branch is initialised as an ``nn.Conv2d``, with its own draw.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device,
            dtype: as in ``nn.Conv2d``. Zero padding only.
        branches: number of branches B.

    Raises:
        ValueError: a number of branches, channels or groups that is not positive, channels that do
            not divide by the groups.

    Example:
        >>> conv = BranchConv2d(3, 8, 3, padding=1, branches=5)
        >>> routes = pyeff.ops.top_k_routes(torch.randn(2, 5), k=2)
        >>> conv(torch.randn(2, 3, 6, 6), routes).shape
        torch.Size([2, 2, 8, 6, 6])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        branches: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(branches, in_channels, out_channels, groups) < 1:
            raise ValueError(
                "BranchConv2d: branches, in_channels, out_channels and groups must be positive, "
                f"got {branches}, {in_channels}, {out_channels} and {groups}"
            )
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"BranchConv2d: in_channels and out_channels must divide by groups {groups}, "
                f"got {in_channels} and {out_channels}"
            )
        self.in_channels, self.out_channels, self.branches = in_channels, out_channels, branches
        self.kernel_size = _pair(kernel_size)
        self.stride, self.dilation, self.groups = _pair(stride), _pair(dilation), groups
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        shape = (branches, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(
                torch.empty(branches, out_channels, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every branch as ``nn.Conv2d`` draws its parameters."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[2:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BranchConv2d":
        # A memory format, which .to() may ask for, is one of [O, C, kh, kw]; the kernels read
        # stacked weights as they are stacked, whatever the format of a single one.
        def of_one(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).contiguous().unflatten(0, tensor.shape[:2])

        super()._apply(of_one, recurse)
        return self

    def forward(self, x: Tensor, routes: Routes | Tensor) -> Tensor:
        """Convolves every image with the branches that it is routed to.

        Args:
            x: ``[N, C, H, W]``, or one map for every pair, ``[N, k, C, H, W]``.
            routes: which branches: ``Routes``, or their index ``[N, k]``.

        Returns:
            ``[N, k, O, H', W']``, O innermost in memory.
        """
        return branch_conv2d(
            x,
            self.weight,
            self.bias,
            routes,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, branches={self.branches}"
        )


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    first, second = value
    return (first, second)
