"""A pair's members that :func:`pyeff.compress.factorize` put two convolutions in the place of."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pyeff.reference.factorized_conv2d import activation


class Members(NamedTuple):
    """The convolutions that stand for each member, in running order: itself, or two."""

    first: tuple[nn.Conv2d, ...]
    second: tuple[nn.Conv2d, ...]


def split_members(first: nn.Module, second: nn.Module) -> Members | None:
    """The convolutions of two members, one of them split at least.

    Args:
        first, second: of a :class:`~pyeff.nn.FactorizedConv2d`.

    Returns:
        ``None`` where the members have to be called as layers: others than ``factorize`` makes in
        the channel form, or with hooks.
    """
    parts = _parts(first), _parts(second)
    if parts[0] is None or parts[1] is None:
        return None
    return Members(parts[0], parts[1])


def _parts(member: nn.Module) -> tuple[nn.Conv2d, ...] | None:
    layers = tuple(member) if type(member) is nn.Sequential else (member,)
    if len(layers) > 2 or any(type(part) is not nn.Conv2d or _has_hooks(part) for part in layers):
        return None
    found = cast(tuple[nn.Conv2d, ...], layers)
    if len(found) == 2 and (_has_hooks(member) or not _only_mixes(found[1])):
        return None
    return found


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _only_mixes(conv: nn.Conv2d) -> bool:
    """Whether it is a 1 x 1 convolution of every pixel by itself."""
    plain = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    return plain and conv.padding in ((0, 0), "valid", "same")


def finished(y: Tensor, residual: Tensor | None, outer: str | None) -> Tensor:
    """``outer(y + residual)``, in ``y``'s memory where no gradient is wanted.

    Args:
        y: a fresh result of a convolution.
        residual: of its shape, or ``None``.
        outer: activation, or ``None``.
    """
    if torch.is_grad_enabled():
        return activation(y if residual is None else y + residual, outer)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if outer == "relu" else activation(y, outer)
