"""One process or several: rank, device, and the few sums that ranks exchange."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """Who this process is.

    Attributes:
        rank: from 0.
        ranks: how many there are.
        device: where this process computes.
    """

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The average of values over all processes, alike in every process.

        Args:
            values: any shape; averaged in its dtype.

        Returns:
            The mean, of the same shape.
        """
        return values if self.ranks == 1 else self.sum(values) / self.ranks

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values over all processes, alike in every process; of the same shape."""
        total = values.clone()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total

    def of_first(self, values: Tensor) -> Tensor:
        """The values of the first process, in every process; they share one shape and dtype."""
        values = values.to(self.device).clone()
        if self.ranks > 1:
            dist.broadcast(values, src=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process raised its flag; alike in every process."""
        if self.ranks == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(raised)
        return bool(raised.item() > 0)

    def copy_buffers(self, model: nn.Module) -> None:
        """Gives every process the buffers (batch norm statistics) of the first."""
        if self.ranks > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the values of the first process's tensors, in place."""
        if self.ranks > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def document(self, document: Any) -> Any:
        """A JSON-able document of the first process, in every process."""
        if self.ranks == 1:
            return document
        content = json.dumps(document).encode() if self.first else b""
        size = self.of_first(torch.tensor([len(content)]))
        held = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
        held = torch.zeros(int(size), dtype=torch.uint8) if held is None else held
        return json.loads(bytes(self.of_first(held).cpu().tolist()))

    def by_first(self, make: Callable[[], Made]) -> Made | None:
        """What a function gives in the first process, the only one that runs it.

        Args:
            make: must not speak to other processes.

        Returns:
            What it made; ``None`` in the other processes.

        Raises:
            RuntimeError: in the other processes, where it failed in the first, which raises its
                own error: nobody goes on to wait for a process that is gone.
        """
        if self.ranks == 1:
            return make()
        made, failure = None, None
        if self.first:
            try:
                made = make()
            except Exception as error:
                failure = error
        told = self.document(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if told is not None:
            raise RuntimeError(f"the first process failed: {told}")
        return made

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.ranks > 1:
            dist.barrier()


def choose_device(name: str) -> torch.device:
    """The device for a name.

    Args:
        name: ``auto`` (CUDA where there is one), or a torch device such as ``cpu``, ``cuda:1``.

    Returns:
        The device.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} must be usable, got a machine without CUDA")
    return device


@contextmanager
def joined(device_name: str) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` started, if it did; leaves them at the end.

    A process group that is there already is used and left standing. CPU processes speak gloo,
    CUDA processes nccl, one GPU each.

    The group's threads end with the group, and that ends with the last reference to it. Whoever
    keeps one (DistributedDataParallel does) drops it before the end: a thread of gloo that still
    frees a tensor while Python shuts down aborts the process.

    Args:
        device_name: see :func:`choose_device`.

    Yields:
        Who this process is.
    """
    device = choose_device(device_name)
    started = not dist.is_initialized() and dist.is_torchelastic_launched()
    if device.type == "cuda" and (started or dist.is_initialized()) and device.index is None:
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    if started:
        # Its default arguments take the group that stands when it is imported, and keep it; torch's
        # compiler, which DistributedDataParallel loads, imports it.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device)
            # Nobody takes the group apart while another process still needs it. Not in `finally`,
            # where a process that failed would wait for the others.
            if started:
                dist.barrier()
        else:
            yield Processes(0, 1, device)
    finally:
        if started:
            dist.destroy_process_group()
