"""Convolutions that are trained as a sum of branches and run as a single one."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.contraction import add_parallel
from pyeff.nn.folding import FoldsNorms, is_affine, norm_affine, norm_tensors
from pyeff.nn.reparam_branches import Branch, ConvBranch, Window

B = TypeVar("B", bound="Reparam")

_MODES = ("zeros", "reflect", "replicate", "circular")


class Reparam(FoldsNorms[tuple[Tensor, Tensor]]):
    """The sum of linear branches, each with batch norms: one convolution in inference.

    In training, and in a norm's training mode, every branch runs by itself. In eval mode the block
    runs as the one convolution that :meth:`contract` gives, computed anew when a tensor changes.
    No activation is part of it. A subclass says which branches it has.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode,
            device, dtype: as in ``nn.Conv2d``, with odd kernels only, since the branches' kernels
            have the same middle. There is no ``bias``: the batch norms bring one.
        norm_eps: of the batch norms.

    Attributes:
        branches: by their names; ``"conv"`` has the whole kernel.

    Raises:
        ValueError: an even kernel, sizes out of range, channels that the groups do not divide, an
            unknown padding.
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
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        taps = self._pair("kernel_size", kernel_size, 1)
        if not (taps[0] % 2 and taps[1] % 2):
            raise ValueError(
                f"{self._op}: kernel_size must be odd, since branches share its middle, got "
                f"{kernel_size}"
            )
        steps, spread = self._pair("stride", stride, 1), self._pair("dilation", dilation, 1)
        self._check_channels(in_channels, out_channels, groups)
        if padding_mode not in _MODES:
            raise ValueError(
                f"{self._op}: padding_mode must be one of {', '.join(map(repr, _MODES))}, got "
                f"{padding_mode!r}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = taps, steps, spread
        self.edges = self._edges(padding, taps, steps, spread)
        self.padding = padding if isinstance(padding, str) else self.edges
        self.padding_mode = padding_mode
        inner = self.edges if padding_mode == "zeros" else (0, 0)
        window = Window(in_channels, out_channels, taps, steps, inner, spread, groups)
        made = {"eps": norm_eps, "device": device, "dtype": dtype}
        self.branches = nn.ModuleDict(self._branches(window, made))

    @property
    def _op(self) -> str:
        return type(self).__name__

    def _branches(self, window: Window, made: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The branches by name; ``made`` is what all are made with."""
        raise NotImplementedError("Reparam: _branches is what a subclass brings")

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, F, H', W']``."""
        if isinstance(x, Proxy) or not (self.is_whole and all(map(is_affine, self._norms()))):
            x = self._padded(x)
            first, *others = (branch(x) for branch in self._each())
            for y in others:
                first = first + y
            return first
        weight, bias = self._folded_for(x)
        edges = self.edges if self.padding_mode == "zeros" else (0, 0)
        return F.conv2d(
            self._padded(x), weight, bias, self.stride, edges, self.dilation, self.groups
        )

    def _padded(self, x: Tensor) -> Tensor:
        """With the frame that is not of zeros; branches put zeros around their maps themselves."""
        if self.padding_mode == "zeros" or self.edges == (0, 0):
            return x
        rows, columns = self.edges
        return F.pad(x, (columns, columns, rows, rows), mode=self.padding_mode)

    def contract(self) -> nn.Conv2d:
        """The plain convolution that computes what the block does in eval mode.

        Computed in float64 from the running statistics, then cast.

        Returns:
            With a bias; of the block's dtype, device and mode, trained on if the block was.

        Raises:
            ValueError: a norm without running statistics, statistics that are not finite, a
                branch that something else was put in the place of.
        """
        self._check_contractible()
        with torch.no_grad():
            weight, bias = self._fold()
            conv = nn.utils.skip_init(
                nn.Conv2d,
                weight.shape[1] * self.groups,
                weight.shape[0],
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                padding_mode=self.padding_mode,
                device=weight.device,
                dtype=weight.dtype,
            )
            conv.weight.copy_(weight)
            cast(Tensor, conv.bias).copy_(bias)
        conv.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return conv.train(self.training)

    @classmethod
    @torch.no_grad()
    def from_compact(cls: type[B], conv: nn.Conv2d, **options: Any) -> B:
        """A block that computes in eval mode what a convolution does.

        The whole kernel of the branch ``"conv"`` makes up for all others. In training mode the
        norms use the statistics of the batch, so that the first steps see other numbers.

        Args:
            conv: with an odd kernel; it is not changed.
            options: further keyword arguments of the class.

        Returns:
            A block of the convolution's dtype, device and mode.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``.
            ValueError: a convolution that the block does not replace.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{cls.__name__}: conv must be an nn.Conv2d, got {type(conv).__name__}")
        block = cls.like(conv, **options)
        main = cast(ConvBranch, block.branches["conv"])
        main.conv.weight.zero_()
        weight, bias = block._sum()
        scale, _ = norm_affine(main.norm, torch.float64)
        main.conv.weight.copy_((conv.weight.double() - weight) / scale[:, None, None, None])
        wanted = torch.zeros_like(bias) if conv.bias is None else conv.bias.double()
        main.norm.bias.add_(wanted - bias)
        return block

    @classmethod
    def like(cls: type[B], conv: nn.Conv2d, **options: Any) -> B:
        """A block with fresh weights of a convolution's sizes, dtype, device and mode.

        Args:
            conv: with an odd kernel.
            options: further keyword arguments of the class.

        Raises:
            ValueError: a convolution that the block does not replace.
        """
        block = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            **options,
        )
        block.requires_grad_(any(p.requires_grad for p in conv.parameters()))
        return block.train(conv.training)

    @property
    def is_whole(self) -> bool:
        """As in :class:`~pyeff.nn.folding.FoldsNorms`; the convolutions are the branches'."""
        return super().is_whole and self._other_layer() is None

    def _other_layer(self) -> str | None:
        """The name of a layer in a branch that is no plain convolution any more."""
        for name, branch in self.branches.items():
            for own, layer in branch.named_children():
                if not isinstance(layer, nn.Conv2d | nn.modules.batchnorm._BatchNorm):
                    return f"{name}.{own}"
        return None

    def _check_contractible(self) -> None:
        other = self._other_layer()
        if other is not None:
            raise ValueError(
                f"{self._op}: branches must be convolutions and batch norms, got {other} "
                f"({type(self.branches.get_submodule(other)).__name__})"
            )
        for norm in self._norms():
            mean, variance = norm.running_mean, norm.running_var
            if mean is None or variance is None:
                raise ValueError(
                    f"{self._op}: norms must have running statistics to be folded, got one without"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
                raise ValueError(
                    f"{self._op}: running statistics must be finite to be folded, got NaN or "
                    "infinity: the training diverged"
                )

    def _norms(self) -> list[nn.BatchNorm2d]:
        # nn.SyncBatchNorm, which may be put in place of a norm, has the same tensors.
        kinds = nn.modules.batchnorm._BatchNorm
        norms = [layer for layer in self.branches.modules() if isinstance(layer, kinds)]
        return cast(list[nn.BatchNorm2d], norms)

    def _each(self) -> list[Branch]:
        return [cast(Branch, branch) for branch in self.branches.values()]

    def _sum(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, in float64."""
        kernel = add_parallel([branch.folded() for branch in self._each()])
        # Every branch ends in a norm, which brings a bias.
        return kernel.weight, cast(Tensor, kernel.bias)

    def _folded_tensors(self) -> list[Tensor]:
        tensors: list[Tensor] = [p for p in self.parameters() if p.dim() == 4]
        for norm in self._norms():
            tensors += norm_tensors(norm)
        return tensors

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution."""
        (weight, bias), dtype = self._sum(), next(self.parameters()).dtype
        return weight.to(dtype), bias.to(dtype)

    def _pair(self, name: str, value: int | tuple[int, ...], least: int) -> tuple[int, int]:
        values = (value, value) if isinstance(value, int) else tuple(value)
        if len(values) != 2 or min(values) < least:
            raise ValueError(
                f"{self._op}: {name} must be one or two ints of at least {least}, got {value}"
            )
        return values[0], values[1]

    def _check_channels(self, in_channels: int, out_channels: int, groups: int) -> None:
        if (
            min(in_channels, out_channels, groups) < 1
            or in_channels % groups + out_channels % groups
        ):
            raise ValueError(
                f"{self._op}: in_channels and out_channels must be positive multiples of groups, "
                f"got {in_channels} and {out_channels} in {groups} groups"
            )

    def _edges(
        self,
        padding: int | tuple[int, ...] | str,
        taps: tuple[int, int],
        steps: tuple[int, int],
        spread: tuple[int, int],
    ) -> tuple[int, int]:
        """Zeros on either side of the rows and of the columns."""
        if padding == "valid":
            return (0, 0)
        if padding == "same":
            if steps != (1, 1):
                raise ValueError(
                    f'{self._op}: stride must be 1 where padding is "same", got {steps}'
                )
            return (spread[0] * (taps[0] // 2), spread[1] * (taps[1] // 2))
        if isinstance(padding, str):
            raise ValueError(
                f'{self._op}: padding must be ints, "same" or "valid", got {padding!r}'
            )
        return self._pair("padding", padding, 0)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}"
        )
