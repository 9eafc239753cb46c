"""The values of a route index: checked once for each version of them."""

import torch
from torch import Tensor

from pyeff.ops._weak_cache import WeakTensorCache

# The highest branch that an index names, -1 where there is no route. No copy of the values is kept,
# since memory that is shared with another library changes without a new version; the native
# functions check what they read.
_highest: WeakTensorCache[int] = WeakTensorCache()


def remember_valid(index: Tensor, branches: int) -> None:
    """Says that an ``index`` just made names branches below ``branches`` only."""
    if not index.is_inference():
        _highest.put(index, branches - 1)


def kernel_index(op: str, index: Tensor, branches: int, *, validate: bool = False) -> Tensor:
    """``index`` as contiguous int32, its values checked on the CPU (elsewhere with ``validate``).

    Raises:
        ValueError: If a value is not the number of a branch.
    """
    if index.is_meta or not (index.is_cpu or validate):
        return index.to(torch.int32).contiguous()
    highest = _highest.get(index)
    if highest is None or highest >= branches:
        highest = _examine(op, index)
        if highest >= branches:
            raise ValueError(
                f"{op}: routes.index must name branches 0 to {branches - 1}, got {highest}"
            )
        if not index.is_inference():
            _highest.put(index, highest)
    if index.dtype == torch.int32 and index.is_contiguous():
        return index
    return index.to(torch.int32).contiguous()


def check_known_values(op: str, index: Tensor, branches: int) -> None:
    """Checks values that are there to be seen: not a compiler's, nor those of a transform."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(index):
        index = functorch.get_unwrapped(index)
    seen = type(index) is Tensor and not functorch.is_functorch_wrapped_tensor(index)
    if seen and not torch.compiler.is_compiling():
        kernel_index(op, index, branches)


def _examine(op: str, index: Tensor) -> int:
    if index.numel() == 0:
        return -1
    lowest, highest = (int(v) for v in index.aminmax())
    if lowest < 0:
        raise ValueError(f"{op}: routes.index must name branches from 0 on, got {lowest}")
    return highest
