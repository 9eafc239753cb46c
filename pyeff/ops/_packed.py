"""One packed copy per weight version, shared by every level that reads the weight."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyeff import _C
from pyeff.ops._weak_cache import WeakTensorCache


class _Packed(NamedTuple):
    form: Hashable
    # None marks a weight that was seen once. Packing waits for the second call, so that weights
    # made for a single use (casts, composed or normalised weights) never pay for a copy.
    copy: Tensor | None


_packed: WeakTensorCache[_Packed] = WeakTensorCache()
# Each frees the copies of one tensor, or of all for None.
_clearings: list[Callable[[Tensor | None], None]] = [_packed.clear]


def on_clear(clear: Callable[[Tensor | None], None]) -> None:
    """Registers what frees other copies of a tensor's values, or all of them for None."""
    _clearings.append(clear)


def packed_weight(weight: Tensor, groups: int) -> Tensor | None:
    """The packed form of a CPU weight, or None where it should be read in place.

    Args:
        weight: [O, I / groups, kh, kw]; of branches [B, O, I / groups, kh, kw] or [B, O, I].
        groups: Of the convolution.
    """
    return _packed_copy(weight, groups, _pack)


def packed_line(weight: Tensor, winograd: bool) -> Tensor | None:
    """The packed form of a 1-D convolution's CPU weight, or None where it is not worth a copy.

    Args:
        weight: [O, I, n, 1] or [O, I, 1, n].
        winograd: For Winograd's F(4, 3), or F(2, 3) in bfloat16.
    """
    return _packed_copy(weight, ("line", winograd), _pack_line)


def pack_line(weight: Tensor) -> Tensor:
    """A packed form that the caller keeps: of a CPU weight [O, I, n, 1], without Winograd."""
    return _pack_line(weight, ("line", False))


def _packed_copy(weight: Tensor, form: Any, pack: Callable[[Tensor, Any], Tensor]) -> Tensor | None:
    """The copy in one form; a weight has one, that of the last form it was asked for in.

    None for inference tensors (they carry no version), for a weight seen for the first time, and
    where a gradient to the weight is being recorded, since the weight is about to change then.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return None
    known = _packed.get(weight)
    if known is not None and known.form == form:
        if known.copy is None:
            known = _Packed(form, pack(weight, form))
            _packed.put(weight, known)
        return known.copy
    if not weight.is_inference():
        _packed.put(weight, _Packed(form, None))
    return None


def _pack(weight: Tensor, groups: int) -> Tensor:
    if weight.dim() == 4:
        packed = _empty(weight, _C.nested_conv2d_packed_elements(weight, groups))
        _C.nested_conv2d_pack(weight, packed, groups, torch.get_num_threads())
        return packed
    stacked = (weight if weight.dim() == 5 else weight[..., None, None]).detach().contiguous()
    packed = _empty(weight, _C.branch_conv2d_packed_elements(stacked, groups))
    _C.branch_conv2d_pack(stacked, packed, groups, torch.get_num_threads())
    return packed


def _pack_line(weight: Tensor, form: tuple[str, bool]) -> Tensor:
    _, winograd = form
    packed = _empty(weight, _C.factorized_conv2d_packed_elements(weight, winograd))
    _C.factorized_conv2d_pack(weight, packed, winograd)
    return packed


def _empty(weight: Tensor, elements: int) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(elements, dtype=dtype)


def clear_packed(weight: Tensor | None = None) -> None:
    """Frees packed copies of weights; they are made again when they are needed.

    Args:
        weight: The weight whose copy is freed; every copy by default.

    Raises:
        TypeError: If ``weight`` is neither a tensor nor None.
    """
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"clear_packed: weight must be a tensor or None, got {type(weight)}")
    for clear in _clearings:
        clear(weight)


def _forget_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Fused optimisers write to parameters without raising their version (torch 2.13).
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for clear in _clearings:
                clear(parameter)


register_optimizer_step_post_hook(_forget_stepped)
