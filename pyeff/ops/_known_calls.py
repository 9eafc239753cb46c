"""Checked calls, remembered by everything that the checks and the choice of a backend look at."""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyeff.ops._dispatch import forced_backend

T = TypeVar("T")
_MAX_CALLS = 4096


class KnownCalls(Generic[T]):
    """What was found out about a call; checking it again costs more than a small convolution."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, T] = {}

    def get(self, tensors: tuple[Tensor | None, ...], options: Any, make: Callable[[], T]) -> T:
        """What ``make`` returned for tensors of these shapes, dtypes and devices, and options.

        Whether gradients are recorded is no part of it, nor are the tensors' values or strides.
        """
        key = (
            *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
            options,
            torch.get_num_threads(),
            forced_backend(),
        )
        try:
            known = self._calls.get(key)
        except (
            TypeError
        ):  # a list where a tuple was meant; the checks accept it or say what is wrong
            return make()
        if known is None:
            known = make()
            if len(self._calls) >= _MAX_CALLS:
                self._calls.clear()
            self._calls[key] = known
        return known
