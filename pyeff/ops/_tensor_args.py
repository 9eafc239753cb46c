"""Checks of tensor arguments, in the words that all operators use."""

from collections.abc import Callable

import torch
from torch import Tensor


def require(op: str, condition: bool, message: Callable[[], str]) -> None:
    """Raises ValueError where ``condition`` is false; under a compiler it becomes a guard."""
    if torch.compiler.is_compiling():
        torch._check(condition)
    elif not condition:
        raise ValueError(f"{op}: {message()}")


def check_tensor(op: str, name: str, value: object, ranks: dict[int, str]) -> None:
    """A floating-point tensor of one of the given ranks (rank -> its shape in words)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")
    if value.dim() not in ranks:
        words = " or ".join(ranks.values())
        raise ValueError(f"{op}: {name} must be {words}, got {list(value.shape)}")


def check_together(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    """The device of x, named ``first``, and except under autocast (which casts) its dtype."""
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first}, {x.device}, got {t.device}"
            )
        if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"{op}: {name} must have the dtype of {first}, {x.dtype}, got {t.dtype}"
            )
