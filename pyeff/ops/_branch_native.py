"""A branch plan as a kernel takes it: its steps parsed and its parameters packed, once."""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import _C
from pyeff.ops._packed import on_clear
from pyeff.ops._weak_cache import WeakTensorCache


class NativePlan:
    """What the kernel needs beside the tensors of a call.

    Attributes:
        program: The steps.
        packed: The parameters of all branches; for the CUDA kernel, the weights.
        vectors: For the CUDA kernel, the other parameters.
    """

    def __init__(
        self, program: "_C.BranchStageProgram", packed: Tensor, vectors: Tensor | None = None
    ) -> None:
        self.program = program
        self.packed = packed
        self.vectors = vectors


class Known(NamedTuple):
    """A native plan as a BranchPlan remembers it; weakly, so that it can be cleared."""

    plan: "weakref.ref[NativePlan]"
    parameters: list[tuple[Tensor, int, int]]  # with pointer and version when they were packed

    def get(self) -> NativePlan | None:
        """The plan, if it is there and no parameter has changed."""
        for tensor, pointer, version in self.parameters:
            if tensor._version != version or tensor.data_ptr() != pointer:
                return None
        return self.plan()


def known(tensors: Sequence[Tensor], plan: NativePlan) -> Known:
    """For a plan that was just asked for."""
    return Known(weakref.ref(plan), [(t, t.data_ptr(), t._version) for t in tensors])


class _Seen(NamedTuple):
    """One parameter as it was packed."""

    tensor: "weakref.ref[Tensor]"
    pointer: int
    version: int


Pack = Callable[[Sequence[Tensor], tuple[int, ...], torch.dtype], NativePlan]


class _Key(NamedTuple):
    pack: Pack
    dtype: torch.dtype
    integers: tuple[int, ...]
    stream: int


class _Entry(NamedTuple):
    key: _Key
    parameters: list[_Seen]
    plan: NativePlan


# Keyed on a plan's first parameter; it may serve several plans.
_entries: WeakTensorCache[list[_Entry]] = WeakTensorCache()


def native_plan(
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    dtype: torch.dtype,
    pack: Pack | None = None,
    stream: int = 0,
) -> NativePlan:
    """The plan that was lowered to these, packed anew where a parameter has changed.

    Args:
        tensors: Tensors of one dtype, on the CPU by default.
        integers: The program.
        dtype: Of the packed parameters.
        pack: Makes the plan; by default, that of the CPU kernel.
        stream: On which it is packed, and alone read: another one would have to wait for it.
    """
    key = _Key(pack or _pack, dtype, tuple(integers), stream)
    if not tensors or any(t.is_inference() for t in tensors):
        return key.pack(tensors, key.integers, dtype)
    entries = _entries.get(tensors[0]) or []
    for entry in entries:
        if entry.key == key and all(map(_unchanged, entry.parameters, tensors)):
            return entry.plan
    plan = key.pack(tensors, key.integers, dtype)
    seen = [_Seen(weakref.ref(t), t.data_ptr(), t._version) for t in tensors]
    current = [e for e in entries if e.key != key]
    _entries.put(tensors[0], [*current, _Entry(key, seen, plan)])
    return plan


def _unchanged(seen: _Seen, tensor: Tensor) -> bool:
    return (
        seen.tensor() is tensor
        and seen.version == tensor._version
        and seen.pointer == tensor.data_ptr()
    )


def _pack(tensors: Sequence[Tensor], integers: tuple[int, ...], dtype: torch.dtype) -> NativePlan:
    program = _C.BranchStageProgram(list(integers))
    packed = torch.empty(program.packed_elements, dtype=dtype)
    _C.branch_stage_pack(program, [t.detach() for t in tensors], packed, torch.get_num_threads())
    return NativePlan(program, packed)


def _clear(tensor: Tensor | None) -> None:
    """Frees the packed parameters of every plan that reads ``tensor``, or of all."""
    if tensor is None:
        _entries.clear()
        return
    for first in _entries.tensors():
        entries = _entries.get(first) or []
        kept = [e for e in entries if not any(seen.tensor() is tensor for seen in e.parameters)]
        if len(kept) < len(entries):
            _entries.put(first, kept)


on_clear(_clear)
