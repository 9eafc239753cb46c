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

from pyeff import _C, _measured

BACKENDS = ("reference", "torch", "cpp", "triton", "cuda")
cuda_is_emulated = False  # tests set it, who run the CUDA kernels on CPU tensors
# Of the process and not of a thread: autograd differentiates GPU operations in threads of its own.
# The last one counts; keys are for leaving, which threads do in any order.
_forced: dict[object, str] = {}
_winograd: ContextVar[bool] = ContextVar("pyeff_winograd", default=True)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every operator in the block on one backend, for tests and comparisons, in every thread.

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
    key = object()
    _forced[key] = name
    try:
        yield
    finally:
        del _forced[key]


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


@contextmanager
def winograd(enabled: bool) -> Iterator[None]:
    """Allows or forbids Winograd's convolutions in the block; they are allowed by default.

    The CPU kernels of ``factorized_conv2d`` use F(4, 3) in float32 where it is faster. It halves
    the multiplications and rounds more: the largest error is some 2e-6 of the largest result
    against some 6e-7 of a direct sum, and results depend on where in a row of four a pixel lies.
    In bfloat16, where no gradient is recorded and the processor has dot products of it, they use
    F(2, 3) with two thirds of the multiplications: the largest error is some 1.2e-2 against 6e-3.

    Args:
        enabled: False for direct sums alone.

    Example:
        >>> x, first = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 1)
        >>> with pyeff.winograd(False):
        ...     y = pyeff.ops.factorized_conv2d(x, first, None, first.mT, None)
    """
    token = _winograd.set(enabled)
    try:
        yield
    finally:
        _winograd.reset(token)


def winograd_allowed() -> bool:
    """Whether the surrounding code lets kernels use Winograd's convolutions."""
    return _winograd.get()


def directions(op: str, device_type: str) -> tuple[str, ...]:
    """The directions of an operator for which a backend is chosen on a type of devices."""
    return tuple(name for name in _table(device_type).get(op, {}) if name != "rates")


@cache
def _table(device_type: str) -> dict[str, Any]:
    """The measured choices for a device type; the file names the device that they come from."""
    text = resources.files("pyeff.ops").joinpath(f"tables/{device_type}.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table


def forced_backend() -> str | None:
    """The backend of the surrounding ``with pyeff.backend(...)``, if any."""
    return next(reversed(_forced.values()), None)


def choose(op: str, x: Tensor, *, direction: str = "forward") -> str:
    """The backend for one call: the forced one, or what was measured.

    Where ``pyeff tune`` measured the device, its nearest shape decides; else the table that is
    shipped.

    Args:
        op: The operator's name.
        x: The input whose device, dtype and shape decide.
        direction: "forward" (no gradient to the weight is recorded), "train" (one is),
            "grad_input" or "grad_weight".
    """
    forced = forced_backend() if _forced else None
    if forced is not None:
        return _check_usable(op, forced, x)
    device = x.device
    measured = _measured.table(device.type, device.index)
    if measured is not None:
        dtype = str(x.dtype).removeprefix("torch.")
        fastest = measured.fastest(op, direction, dtype, *_measured.size_of(x.shape))
        if fastest is not None:
            return _check_usable(op, fastest, x)
    return _choice(op, direction, device.type, x.dtype)


def measured_rates(op: str, x: Tensor) -> dict[str, float]:
    """The measured rates of an operator's forms for the device and the dtype of ``x``."""
    return _rates(op, x.device.type, x.dtype)


@cache
def _rates(op: str, device_type: str, dtype: torch.dtype) -> dict[str, float]:
    rates = _table(device_type)[op]["rates"]
    return {**rates["default"], **rates.get(str(dtype).removeprefix("torch."), {})}


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
    if name == "cuda" and not cuda_is_emulated and not _C.cuda_info()["built"]:
        raise RuntimeError(f"{op}: backend cuda is not in this build; build it where nvcc is")
    return name


def _interpreted(name: str) -> bool:
    """Whether kernels run on CPU tensors: Triton's in its interpreter, CUDA's in tests."""
    if name == "cuda":
        return cuda_is_emulated
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
