"""Values computed from a layer's tensors, kept until one of the tensors changes."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyeff.ops._packed import on_clear

T = TypeVar("T")
_Stamp = tuple["weakref.ref[Tensor]", int, int]  # a tensor, where its data lie, its version

# How often weights may have changed without a new version: fused optimisers raise none, and a call
# of clear_packed says that something else wrote them unseen.
_unseen_changes = 0


def _count_change(*_: Any) -> None:
    global _unseen_changes
    _unseen_changes += 1


register_optimizer_step_post_hook(_count_change)
on_clear(_count_change)


class DerivedValue(Generic[T]):
    """Holds one value, such as weights with a norm folded in, and what it was computed from.

    The value is computed again after an in-place change of a tensor, in place of which another
    tensor came, after any optimiser step and after ``pyeff.clear_packed``. A copy of the holder,
    pickled or deep, is empty. What replaces a tensor's memory but not its version
    (``nn.Module.to``) has to call :meth:`clear`.
    """

    def __init__(self) -> None:
        self._held: tuple[int, list[_Stamp], T] | None = None

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The value for the tensors as they are.

        Args:
            tensors: all that ``compute`` reads. Inference tensors carry no version: with one of
                them nothing is kept.
            compute: gives the value.
        """
        held = self._held
        if held is not None and held[0] == _unseen_changes and len(held[1]) == len(tensors):
            for tensor, (reference, pointer, version) in zip(tensors, held[1], strict=True):
                if reference() is not tensor or pointer != tensor.data_ptr():
                    break
                if version != tensor._version:
                    break
            else:
                return held[2]
        value = compute()
        self._held = None
        if not any(tensor.is_inference() for tensor in tensors):
            stamps = [(weakref.ref(t), t.data_ptr(), t._version) for t in tensors]
            self._held = (_unseen_changes, stamps, value)
        return value

    def clear(self) -> None:
        """Forgets the value."""
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": None}
