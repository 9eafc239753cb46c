"""Which backend and which instruction set an operator runs on: the one place that decides."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from pyeff import _C

BACKENDS = ("reference", "torch", "cpp", "triton", "cuda")
_forced: ContextVar[str | None] = ContextVar("pyeff_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every operator in the block on one backend, for tests and comparisons.

    Args:
        name: "reference" (plain PyTorch, the meaning), "torch" (cuDNN, oneDNN through ATen),
            "cpp" (own CPU kernels), "triton" or "cuda" (own GPU kernels).

    Raises:
        ValueError: If there is no backend of that name. An operator raises ValueError where the
            backend cannot take its tensors, and RuntimeError where it is not installed.

    Example:
        >>> x, weight = torch.randn(1, 8, 5, 5), torch.randn(4, 8, 3, 3)
        >>> with pyeff.backend("reference"):
        ...     y = pyeff.ops.nested_conv2d(x, weight)
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels in the block with one instruction set, in every thread.

    Args:
        name: "generic", "avx2", "avx512" or "amx".

    Raises:
        ValueError: If this build or this machine does not have it.
    """
    before = _C.isa()
    _C.force_isa(name)
    try:
        yield
    finally:
        _C.force_isa(None)
        if _C.isa() != before:
            _C.force_isa(before)


@cache
def _table(device_type: str) -> dict[str, Any]:
    """The measured choices for a device type; the file names the device that they come from."""
    text = resources.files("pyeff.ops").joinpath(f"tables/{device_type}.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table


def forced_backend() -> str | None:
    """The backend of the surrounding ``with pyeff.backend(...)``, if any."""
    return _forced.get()


def choose(op: str, x: Tensor, *, direction: str = "forward") -> str:
    """The backend for one call.

    Args:
        op: The operator's name.
        x: The input whose device and dtype decide.
        direction: "forward" (no gradient to the weight is recorded), "train" (one is),
            "grad_input" or "grad_weight".
    """
    forced = _forced.get()
    if forced is not None:
        return _check_usable(op, forced, x)
    return _choice(op, direction, x.device.type, x.dtype)


@cache
def _choice(op: str, direction: str, device_type: str, dtype: torch.dtype) -> str:
    rules = _table(device_type)[op][direction]
    choice: str = rules.get(str(dtype).removeprefix("torch."), rules["default"])
    return choice


def _check_usable(op: str, name: str, x: Tensor) -> str:
    if name == "cpp" and not x.is_cpu:
        raise ValueError(f"{op}: backend cpp must get CPU tensors, got {x.device}")
    if name in ("triton", "cuda") and not x.is_cuda and not _interpreted(name):
        raise ValueError(f"{op}: backend {name} must get CUDA tensors, got {x.device}")
    if name == "triton":
        _require_triton(op)
    return name


def _interpreted(name: str) -> bool:
    """Triton's interpreter runs kernels on CPU tensors; tests do that."""
    if name != "triton":
        return False
    _require_triton("backend")
    import triton

    return bool(triton.knobs.runtime.interpret)


def _require_triton(op: str) -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{op}: backend triton is not installed; pip install triton (Linux)"
        ) from error
