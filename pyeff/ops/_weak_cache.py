"""Results derived from a tensor's values, kept as long as the tensor stays alive and unchanged."""

import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    tensor: "weakref.ref[Tensor]"
    pointer: int
    version: int
    value: T


class WeakTensorCache(Generic[T]):
    """Maps a tensor to a value computed from its contents.

    Keyed weakly on the tensor object and checked by data pointer and version, so that an in-place
    change, ``set_`` or a recycled id never yields a stale value. Inference tensors have no
    version; they are not cached.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[T]] = {}

    def get(self, tensor: Tensor) -> T | None:
        """The value for ``tensor`` as it is now, or None."""
        entry = self._entries.get(id(tensor))
        if entry is None:
            return None
        reference, pointer, version, value = entry
        if reference() is not tensor or pointer != tensor.data_ptr() or version != tensor._version:
            return None
        return value

    def put(self, tensor: Tensor, value: T) -> None:
        """Keeps ``value`` for ``tensor``; ``value`` must not refer to ``tensor``."""
        key = id(tensor)
        entries = self._entries

        def forget(dead: "weakref.ref[Tensor]") -> None:
            entry = entries.get(key)
            if entry is not None and entry.tensor is dead:
                del entries[key]

        reference = weakref.ref(tensor, forget)
        entries[key] = _Entry(reference, tensor.data_ptr(), tensor._version, value)

    def get_or_compute(self, tensor: Tensor, compute: Callable[[Tensor], T]) -> T:
        """The cached value, computed now where there is none."""
        if tensor.is_inference():
            return compute(tensor)
        value = self.get(tensor)
        if value is None:
            value = compute(tensor)
            self.put(tensor, value)
        return value

    def clear(self, tensor: Tensor | None = None) -> None:
        """Forgets one tensor, or everything."""
        if tensor is None:
            self._entries.clear()
        else:
            self._entries.pop(id(tensor), None)

    def tensors(self) -> list[Tensor]:
        """The live tensors for which a value is kept, up to date or not."""
        live = (entry.tensor() for entry in list(self._entries.values()))
        return [tensor for tensor in live if tensor is not None]

    def __len__(self) -> int:
        return len(self._entries)
