"""One packed copy per weight version, shared by every level that reads the weight."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyeff import _C
from pyeff.ops._weak_cache import WeakTensorCache

# True marks a weight that was seen once. Packing waits for the second call, so that weights made
# for a single use (casts, composed or normalised weights) never pay for a copy.
_packed: WeakTensorCache[Tensor | bool] = WeakTensorCache()


def packed_weight(weight: Tensor, groups: int) -> Tensor | None:
    """The packed form of a CPU weight, or None where it should be read in place.

    None for inference tensors (they carry no version), for a weight seen for the first time, and
    where a gradient to the weight is being recorded, since the weight is about to change then.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return None
    known = _packed.get(weight)
    if isinstance(known, Tensor):
        return known
    if weight.is_inference():
        return None
    if known is None:
        _packed.put(weight, True)
        return None
    elements = _C.nested_conv2d_packed_elements(weight, groups)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    packed = torch.empty(elements, dtype=dtype)
    _C.nested_conv2d_pack(weight, packed, groups, torch.get_num_threads())
    _packed.put(weight, packed)
    return packed


def clear_packed(weight: Tensor | None = None) -> None:
    """Frees packed copies of weights; they are made again when they are needed.

    Args:
        weight: The weight whose copy is freed; every copy by default.

    Raises:
        TypeError: If ``weight`` is neither a tensor nor None.
    """
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"clear_packed: weight must be a tensor or None, got {type(weight)}")
    _packed.clear(weight)


def _forget_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Fused optimisers write to parameters without raising their version (torch 2.13).
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _packed.clear(parameter)


register_optimizer_step_post_hook(_forget_stepped)
