"""Arguments that the branch operators share, brought into one form and checked."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyeff.ops._branch_index import kernel_index
from pyeff.ops.top_k_routes import Routes


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


def check_bias(op: str, bias: object, shape: tuple[int, ...]) -> None:
    """None, or a tensor of ``shape``."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.shape != shape:
        raise ValueError(f"{op}: bias must be {list(shape)}, got {list(bias.shape)}")


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


def index_of(routes: Routes | Tensor) -> Tensor:
    """The index of routes of either kind, unchecked."""
    return routes.index if isinstance(routes, Routes) else routes


def route_index(
    op: str, routes: Routes | Tensor, x: Tensor, branches: int, *, validate: bool
) -> Tensor:
    """The index [N, k] of ``routes`` for a batch x [N, ...] or one row a pair [N, k, ...].

    Its values are checked where the kernel runs, which knows them also under a compiler; here only
    those on a GPU, where ``validate`` asks for it.
    """
    index = index_of(routes)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: routes must be Routes or an int32 or int64 tensor, got {kind}")
    if index.dim() != 2 or index.shape[1] == 0:
        raise ValueError(
            f"{op}: routes.index must be [N, k], k at least 1, got {list(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(
            f"{op}: routes.index must be on the device of x, {x.device}, got {index.device}"
        )
    require(
        op,
        index.shape[0] == x.shape[0],
        lambda: (
            f"routes.index must have a row for each of {x.shape[0]} images, got {list(index.shape)}"
        ),
    )
    if validate and index.is_cuda and not torch.compiler.is_compiling():
        kernel_index(op, index, branches, validate=True)
    return index
