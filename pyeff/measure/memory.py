"""How many bytes of activations a network needs at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive after every operation, apart from those known before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(t.untyped_storage()).cdata for t in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.known:
            self.live[reference.cdata] = (reference, storage.nbytes())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak_activation_bytes(model: nn.Module, x: Tensor) -> int:
    """The most bytes of activations alive at once in a forward pass without gradient.

    Counts the storages that the operations put out, and the input; what a kernel uses inside an
    operation is not seen. Run it on the meta device: nothing is computed then.

    Args:
        model: the network.
        x: its input, ``[N, C, H, W]``.
    """
    mode = _LiveBytes([*model.parameters(), *model.buffers()])
    mode.add(x)
    mode.peak = x.untyped_storage().nbytes()
    with torch.no_grad(), mode:
        model(x)
    return mode.peak
