"""Arguments that the branch operators share, brought into one form and checked."""

import torch
from torch import Tensor

from pyeff.ops._branch_index import kernel_index
from pyeff.ops._tensor_args import require
from pyeff.ops.top_k_routes import Routes


def check_bias(op: str, bias: object, shape: tuple[int, ...]) -> None:
    """None, or a tensor of ``shape``."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.shape != shape:
        raise ValueError(f"{op}: bias must be {list(shape)}, got {list(bias.shape)}")


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


def require_one_per_route(op: str, what: str, x: Tensor, index: Tensor) -> None:
    """Of an x [N, k, ...] that has one ``what`` for every pair: k is that of the index."""
    require(
        op,
        x.shape[1] == index.shape[1],
        lambda: f"x must have {what} for each of {index.shape[1]} routes, got {list(x.shape)}",
    )
