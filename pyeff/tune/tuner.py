"""Finds for every operator, direction and dtype which backend is fastest, and writes it down."""

import json
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

import pyeff._C as _C
from pyeff import _measured
from pyeff._archive import write_bytes_atomically
from pyeff._measured import Row, Table, TileRow
from pyeff.ops._dispatch import backend, directions
from pyeff.tune.cases import CHANNELS, IMAGES, OPERATORS, Call, Case, cases
from pyeff.tune.timing import seconds_of

if TYPE_CHECKING:
    from pyeff.triton_kernels.measured_tiles import Asked

_OP = "tune"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# On the CPU pairs are chosen by estimates for their exact shape: see cpu.json's rates.
_BY_RATES = {"cpu": ("factorized_conv2d",), "cuda": ()}


class Progress(Protocol):
    """Hears of every case before it is measured."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` cases are measured; ``text`` names the next."""


def tune(
    device: str = "auto",
    *,
    operators: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    channels: Sequence[int] = CHANNELS,
    images: Sequence[tuple[int, int]] = IMAGES,
    slice_seconds: float = 0.01,
    progress: Progress | None = None,
) -> Table:
    """Measures the backends of the operators against each other on one device.

    Every backend runs each operator forward, forward with gradients recorded, and backward, in
    turn. Of Triton's kernels every tile that fits the device is tried first, and the fastest runs
    against the other backends. Nothing else should use the device meanwhile.

    Args:
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or a CUDA device.
        operators: of :data:`pyeff.tune.cases.OPERATORS`; by default all. On the CPU
            ``factorized_conv2d`` is left out: it decides by estimates for its exact shape.
        dtypes: float32, bfloat16 and float16 by default; what is not measured goes by the table
            that is shipped.
        channels: of the inputs.
        images: (how many, side in pixels) of the inputs.
        slice_seconds: how long a call is repeated within a round; seven rounds.
        progress: hears of every case.

    Returns:
        The table, for :func:`save`. It does not count before it is saved.

    Raises:
        ValueError: the device is not there, or an operator is unknown.

    Example:
        >>> import pyeff.tune
        >>> table = pyeff.tune.tune(
        ...     "cpu",
        ...     operators=["nested_conv2d"],
        ...     dtypes=[torch.float32],
        ...     channels=[16],
        ...     images=[(1, 8)],
        ... )
        >>> table.fastest("nested_conv2d", "forward", "float32", 32, 100) in ("cpp", "torch")
        True
    """
    where = _device(device)
    known = [op for op in OPERATORS if op not in _BY_RATES[where.type]]
    for op in operators or ():
        if op not in known:
            raise ValueError(
                f"{_OP}: operators must be of {', '.join(known)} on {where.type}, got {op!r}"
            )
    every = list(
        cases(
            tuple(operators or known),
            tuple(dtypes or DTYPES),
            tuple(channels),
            tuple(images),
        )
    )
    rows: list[Row] = []
    tiles: dict[tuple[object, ...], TileRow] = {}
    for done, case in enumerate(every):
        if progress is not None:
            progress(done, len(every), f"{case.op} {_name(case.dtype)} {case.channels} channels")
        found, best = _measure(case, where, slice_seconds)
        rows += found
        tiles |= {row[:5]: row for row in best}
    versions = {"pyeff": _C.version, "torch": torch.__version__}
    name = _measured.device_name(where.type, where.index)
    return Table(name, rows, list(tiles.values()), versions)


def save(table: Table, path: Path | None = None) -> Path:
    """Writes a table, which counts in every process that starts later.

    This process too reads it, but calls that it has seen keep the backend that they were given.

    Args:
        table: of :func:`tune`.
        path: another place, where it does not count.

    Returns:
        Where it is: by default a file with the device's name in ``.cache/pyeff`` of the home.
    """
    where = path or _measured.path_of(table.device)
    write_bytes_atomically(where, (json.dumps(table.to_json(), indent=1) + "\n").encode())
    _measured.table.cache_clear()
    return where


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in _BY_RATES:
        raise ValueError(f"{_OP}: device must be auto, cpu or a CUDA device, got {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{_OP}: device {name} must be usable, got a machine without CUDA")
        device = torch.device("cuda", device.index or 0)
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backends(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["cpp", "torch"]
    names = ["torch"]
    if util.find_spec("triton") is not None:
        names.append("triton")
    if _C.cuda_info()["built"]:
        names.append("cuda")
    return names


def _measure(
    case: Case, device: torch.device, slice_seconds: float
) -> tuple[list[Row], list[TileRow]]:
    """Every direction of a case on every backend, and the tiles of Triton's kernels."""
    torch.manual_seed(0)
    call = case.call(device)
    channels, pixels = _measured.size_of(call.x.shape)
    rows, tiles = [], []
    for direction in directions(case.op, device.type):
        candidates = {}
        for name in _backends(device):
            run = _on(name, _direction(call, direction, name))
            if name == "triton":
                best = _best_tiles(run, device, slice_seconds)
                tiles += [
                    TileRow(a.task, a.kind, a.rows, a.cols, a.groups, tile)
                    for a, tile in best.items()
                ]
                run = _with_tiles(run, best)
            candidates[name] = run
        seconds = seconds_of(candidates, device, slice_seconds)
        rows.append(Row(case.op, direction, _name(case.dtype), channels, pixels, seconds))
    return rows, tiles


def _direction(call: Call, direction: str, name: str) -> Callable[[], object]:
    """One direction alone."""
    if direction == "train":
        return call.run
    if direction == "forward":
        return torch.no_grad()(call.run)
    wanted = {
        "grad_input": call.inputs,
        "grad_weight": call.weights,
        "backward": call.inputs + call.weights,
    }[direction]
    with backend(name):
        y = call.run()
    grad = torch.randn_like(y)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, grad, retain_graph=True)

    return gradients


def _on(name: str, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with backend(name):
            return run()

    return forced


def _tiles() -> tuple[ModuleType, ModuleType]:
    from pyeff.triton_kernels import measured_tiles, tiles  # Triton is there only where it is used

    return measured_tiles, tiles


def _best_tiles(
    run: Callable[[], object], device: torch.device, slice_seconds: float
) -> "dict[Asked, tuple[int, ...]]":
    """The fastest tile for each shape that a call's kernels ask for."""
    measured_tiles, tiles = _tiles()
    with measured_tiles.asking() as asked:
        run()
    best: dict[Asked, tuple[int, ...]] = {}
    for one in asked:
        fitting = tiles.fitting(one.task, one.kind, device)
        trials = {str(i): _with_tiles(run, {one: tile}) for i, tile in enumerate(fitting)}
        if len(trials) > 1:
            seconds = seconds_of(trials, device, slice_seconds)
            best[one] = tuple(fitting[int(min(seconds, key=seconds.__getitem__))])
    return best


def _with_tiles(
    run: Callable[[], object], chosen: "dict[Asked, tuple[int, ...]]"
) -> Callable[[], object]:
    measured_tiles, _ = _tiles()

    def with_them() -> object:
        with measured_tiles.trying(chosen):
            return run()

    return with_them
