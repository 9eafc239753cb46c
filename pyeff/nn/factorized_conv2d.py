"""A convolution made of two one-dimensional ones with an activation between them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.folding import (
    FoldsNorms,
    are_layers_apart,
    is_affine,
    norm_affine,
    norm_tensors,
)
from pyeff.nn.split_members import Members, finished, split_members
from pyeff.ops.factorized_conv2d import factorized_conv2d
from pyeff.reference.factorized_conv2d import activation

ORDERS = ("vertical_first", "horizontal_first")
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")
NORMS = (None, "inner", "outer", "both")

_OP = "FactorizedConv2d"


class _Folded(NamedTuple):
    """Weights and biases with a norm in them: of the first member, of the last convolution.

    The fused call takes the outer norm as a scale and a shift instead.
    """

    first: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None


_PLAIN = _Folded()


class FactorizedConv2d(FoldsNorms[_Folded]):
    """An n x 1 and a 1 x n convolution in place of an n x n one: ``second(inner(first(x)))``.

    The members are ordinary ``nn.Conv2d``, :attr:`first` and :attr:`second`, so their weights can
    be pruned, factored and saved as such; they run as one call that never stores the map between
    them. In eval mode batch norms, a residual and the activation after it are part of that call.
    Where :func:`pyeff.compress.factorize` split the second member, the call ends before its 1 x 1
    convolution; a first member that is split runs as two convolutions. Norms are folded then too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in ``nn.Conv2d``, with one odd kernel size and one
            stride, padding and dilation for both axes, groups 1 and zero padding only.
            ``padding="same"`` is ``dilation * (n // 2)`` with any stride. Without anything between
            the members the first has no bias: the zeros around the map between them would make it
            something else than a bias.
        rank: channels L between the members; ``out_channels`` by default.
        order: ``"vertical_first"`` (n x 1, then 1 x n) or ``"horizontal_first"``; for n = 1
            they are the same.
        inner: activation between the members: ``"relu"``, ``"relu6"``, ``"silu"``,
            ``"hardswish"`` or ``None``.
        norm: where a batch norm stands: ``"inner"`` (after the first member, before the inner
            activation), ``"outer"`` (after the second), ``"both"`` or ``None``.
        norm_eps: of the batch norms.

    Attributes:
        first, second: the members.
        norm_inner, norm_outer: the batch norms, or ``None``.

    Raises:
        ValueError: an even or uneven kernel, different numbers for the two axes, groups, padding
            other than with zeros, a rank that is not positive, an unknown order, activation or
            norm.

    Source: Alvarez, Petersson, "DecomposeMe: Simplifying ConvNets for End-to-End Learning",
    arXiv 1606.05426; Romera et al., "ERFNet", T-ITS 2018.

    Example:
        >>> conv = FactorizedConv2d(8, 16, 3, padding=1, norm="outer")
        >>> conv(torch.randn(1, 8, 5, 5), outer="relu").shape
        torch.Size([1, 16, 5, 5])
    """

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
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        order: str = "vertical_first",
        inner: str | None = "relu",
        norm: str | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        taps = _one("kernel_size", kernel_size, 1)
        if taps % 2 == 0:
            raise ValueError(f"{_OP}: kernel_size must be odd, got {kernel_size}")
        step, spread = _one("stride", stride, 1), _one("dilation", dilation, 1)
        edge = _padding(padding, taps, spread)
        rank = out_channels if rank is None else rank
        _check_sizes(in_channels, out_channels, rank)
        _check_choices(groups, padding_mode, order, inner, norm)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size, self.stride = (taps, taps), (step, step)
        self.padding, self.dilation = (edge, edge), (spread, spread)
        self.groups, self.padding_mode = groups, padding_mode
        self.order, self.inner, self.norm = order, inner, norm
        between = inner is not None or norm in ("inner", "both")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        # Single taps have no axis of their own: the operator takes the first one for vertical.
        vertical_first = order == "vertical_first" or taps == 1
        for name, channels, vertical in (
            ("first", (in_channels, rank), vertical_first),
            ("second", (rank, out_channels), not vertical_first),
        ):
            along = (
                ((taps, 1), (step, 1), (edge, 0), (spread, 1))
                if vertical
                else ((1, taps), (1, step), (0, edge), (1, spread))
            )
            has_bias = bias and (between or name == "second")
            self.add_module(name, nn.Conv2d(*channels, *along, 1, has_bias, **made))
        self.norm_inner = _norm(norm in ("inner", "both"), rank, norm_eps, made)
        self.norm_outer = _norm(norm in ("outer", "both"), out_channels, norm_eps, made)

    first: nn.Conv2d
    second: nn.Conv2d

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        rank: int | None = None,
        order: str = "vertical_first",
        inner: str | None = None,
    ) -> "FactorizedConv2d":
        """The pair nearest to a convolution: its spatial singular value decomposition.

        Exact at full rank where ``inner`` is None, at the borders too. With an activation between
        the members it is only a start for training.

        Args:
            conv: an n x n convolution, n odd, with groups 1; it is not changed.
            rank: channels between the members; the full ``n * min(C, F)`` by default.
            order: as above.
            inner: as above.

        Returns:
            A layer with the convolution's stride, padding, dilation, dtype and device.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``.
            ValueError: a convolution that no pair replaces, a rank out of range.

        Source: Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural Networks with Low
        Rank Expansions", BMVC 2014, scheme 2.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{_OP}: conv must be an nn.Conv2d, got {type(conv).__name__}")
        taps = conv.kernel_size[0]
        full = taps * min(conv.in_channels, conv.out_channels)
        rank = full if rank is None else rank
        if not 1 <= rank <= full:
            raise ValueError(f"{_OP}: rank must be in 1..{full}, got {rank}")
        pair = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            rank=rank,
            order=order,
            inner=inner,
        )
        # [C, taps of the first, F, taps of the second]
        axes = (1, 2, 0, 3) if order == "vertical_first" else (1, 3, 0, 2)
        grid = conv.weight.double().permute(axes)
        left, values, right = torch.linalg.svd(grid.flatten(2).flatten(0, 1), full_matrices=False)
        root = values[:rank].sqrt()
        first = (left[:, :rank] * root).T.unflatten(1, grid.shape[:2])  # [L, C, taps]
        second = (root[:, None] * right[:rank]).unflatten(1, grid.shape[2:])  # [L, F, taps]
        pair.first.weight.copy_(first.reshape(pair.first.weight.shape))
        pair.second.weight.copy_(second.transpose(0, 1).reshape(pair.second.weight.shape))
        if pair.first.bias is not None:
            pair.first.bias.zero_()
        if pair.second.bias is not None and conv.bias is not None:
            pair.second.bias.copy_(conv.bias)
        return pair.train(conv.training)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, outer: str | None = None
    ) -> Tensor:
        """Convolves: ``outer(norm(second(inner(first(x)))) + residual)``.

        Args:
            x: ``[N, C, H, W]``.
            residual: added before the outer activation, ``[N, F, H', W']``.
            outer: activation at the end; ``None`` for none.

        Returns:
            ``[N, F, H', W']``, channels_last.
        """
        check_activation(_OP, "outer", outer)
        members = None if isinstance(x, Proxy) else self._members()
        if members is None:
            y = self._by_members(x)
        elif self.norm is None:
            return self._run(members, x, _PLAIN, residual, outer)
        elif is_affine(self.norm_inner) and is_affine(self.norm_outer):
            return self._run(members, x, self._folded_for(x, residual), residual, outer)
        elif self.norm_inner is None:
            y = self._run(members, x, _PLAIN, None, None)
        else:
            y = self._by_members(x)
        if self.norm_outer is not None:
            y = self.norm_outer(y)
        return activation(y if residual is None else y + residual, outer)

    def _by_members(self, x: Tensor) -> Tensor:
        """The pair as calls of its layers: what tracers see, and what batch statistics need."""
        y = self.first(x)
        if self.norm_inner is not None:
            y = self.norm_inner(y)
        return self.second(activation(y, self.inner))

    def _members(self) -> Members | None:
        """The convolutions to run; ``None`` where the layers have to be called."""
        if self.is_whole:
            return Members((self.first,), (self.second,))
        return None if are_layers_apart() else split_members(self.first, self.second)

    def _run(
        self,
        members: Members,
        x: Tensor,
        folded: _Folded,
        residual: Tensor | None,
        outer: str | None,
    ) -> Tensor:
        (*before, first), (second, *after) = members
        weight, bias = folded.first or (first.weight, first.bias)
        if not before:
            ends = {"residual": residual, "outer": outer} if not after else {}
            y = self._run_fused(x, weight, bias, second, folded.scale, folded.shift, **ends)
            if not after:
                return y
        else:
            y = before[0](x.contiguous(memory_format=torch.channels_last))
            y = finished(first._conv_forward(y, weight, bias), None, self.inner)
            y = second(y) if after else y
        last = members.second[-1]
        weight, bias = folded.last or (last.weight, last.bias)
        return finished(last._conv_forward(y, weight, bias), residual, outer)

    def _run_fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        second: nn.Conv2d,
        scale: Tensor | None,
        shift: Tensor | None,
        **ends: Any,
    ) -> Tensor:
        return factorized_conv2d(
            x,
            weight,
            bias,
            second.weight,
            second.bias,
            stride=self.stride[0],
            padding=self.padding[0],
            dilation=self.dilation[0],
            inner=self.inner,
            scale=scale,
            shift=shift,
            **ends,
        )

    def _folded_tensors(self) -> list[Tensor]:
        tensors = norm_tensors(self.norm_outer) + norm_tensors(self.norm_inner)
        members = self._members()
        if members is None:
            return tensors + list(self.parameters())
        folded = [members.first[-1]] if self.norm_inner is not None else []
        if self.norm_outer is not None and not self.is_whole:
            folded.append(members.second[-1])
        for conv in folded:
            tensors += [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
        return tensors

    def _fold(self) -> _Folded:
        """The norms as numbers of the calls. Both are in eval mode."""
        members = self._members()
        if members is None:
            raise RuntimeError(f"{_OP}: members must be convolutions to be folded, got others")
        first = last = scale = shift = None
        if self.norm_inner is not None:
            first = _with_norm(members.first[-1], self.norm_inner)
        if self.norm_outer is not None:
            if self.is_whole:
                dtype = self.second.weight.dtype
                scale, shift = (t.to(dtype) for t in norm_affine(self.norm_outer))
            else:
                last = _with_norm(members.second[-1], self.norm_outer)
        return _Folded(first, scale, shift, last)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.order}, rank={self.rank}, inner={self.inner}, norm={self.norm}"


def _with_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the norm after it."""
    weight, bias = conv.weight, conv.bias
    gain, offset = norm_affine(norm)
    if bias is not None:
        offset = offset + gain * bias
    return (weight * gain[:, None, None, None]).to(weight.dtype), offset.to(weight.dtype)


def _norm(wanted: bool, channels: int, eps: float, made: dict[str, Any]) -> nn.BatchNorm2d | None:
    return nn.BatchNorm2d(channels, eps, **made) if wanted else None


def _one(name: str, value: int | tuple[int, ...], minimum: int) -> int:
    """The one number that stands for both axes."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or values[0] != values[1]:
        raise ValueError(f"{_OP}: {name} must be one int for both axes, got {value}")
    if values[0] < minimum:
        raise ValueError(f"{_OP}: {name} must be at least {minimum}, got {value}")
    return values[0]


def _padding(value: int | tuple[int, ...] | str, taps: int, dilation: int) -> int:
    if not isinstance(value, str):
        return _one("padding", value, 0)
    if value not in ("same", "valid"):
        raise ValueError(f'{_OP}: padding must be an int, "same" or "valid", got {value!r}')
    return dilation * (taps // 2) if value == "same" else 0


def _check_sizes(in_channels: int, out_channels: int, rank: int) -> None:
    if min(in_channels, out_channels) < 1:
        raise ValueError(
            f"{_OP}: in_channels and out_channels must be positive, got {in_channels} and "
            f"{out_channels}"
        )
    if rank < 1:
        raise ValueError(f"{_OP}: rank must be positive, got {rank}")


def _check_choices(
    groups: int, padding_mode: str, order: str, inner: str | None, norm: str | None
) -> None:
    if groups != 1:
        raise ValueError(f"{_OP}: groups must be 1, got {groups}")
    if padding_mode != "zeros":
        raise ValueError(f"{_OP}: padding_mode must be 'zeros', got {padding_mode!r}")
    for name, value, known in (("order", order, ORDERS), ("norm", norm, NORMS)):
        if value not in known:
            allowed = ", ".join(map(repr, known))
            raise ValueError(f"{_OP}: {name} must be one of {allowed}, got {value!r}")
    check_activation(_OP, "inner", inner)


def check_activation(op: str, name: str, value: str | None) -> None:
    """Raises ValueError for an activation that there is not."""
    if value not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}")
