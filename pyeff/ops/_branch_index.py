"""The values of a route index: checked once, kept as long as the index lives."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.ops._weak_cache import WeakTensorCache


class _Known(NamedTuple):
    highest: int  # -1 where there is no route
    int32: Tensor | None  # the form that kernels read, where it is not the index itself


_known: WeakTensorCache[_Known] = WeakTensorCache()


def remember_valid(index: Tensor, branches: int) -> None:
    """Says that a contiguous int32 ``index`` just made names branches below ``branches`` only."""
    if not index.is_inference():
        _known.put(index, _Known(branches - 1, None))


def kernel_index(op: str, index: Tensor, branches: int, *, validate: bool = False) -> Tensor:
    """``index`` as contiguous int32, its values checked on the CPU (elsewhere with ``validate``).

    Raises:
        ValueError: If a value is not the number of a branch.
    """
    if index.is_meta or not (index.is_cpu or validate):
        return index.to(torch.int32).contiguous()
    known = _known.get_or_compute(index, lambda index: _examine(op, index))
    if known.highest >= branches:
        raise ValueError(
            f"{op}: routes.index must name branches 0 to {branches - 1}, got {known.highest}"
        )
    return index if known.int32 is None else known.int32


def check_known_values(op: str, index: Tensor, branches: int) -> None:
    """Checks values that are there to be seen: not a compiler's, nor those of a transform."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(index):
        index = functorch.get_unwrapped(index)
    seen = type(index) is Tensor and not functorch.is_functorch_wrapped_tensor(index)
    if seen and not torch.compiler.is_compiling():
        kernel_index(op, index, branches)


def _examine(op: str, index: Tensor) -> _Known:
    if index.numel() == 0:
        return _Known(-1, index.to(torch.int32).contiguous())
    lowest, highest = (int(v) for v in index.aminmax())
    if lowest < 0:
        raise ValueError(f"{op}: routes.index must name branches from 0 on, got {lowest}")
    if index.dtype == torch.int32 and index.is_contiguous():
        return _Known(highest, None)
    # A copy, so that the cached value does not keep its own key alive.
    return _Known(
        highest, torch.empty(index.shape, dtype=torch.int32, device=index.device).copy_(index)
    )
