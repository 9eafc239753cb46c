"""Which tile a Triton kernel runs with: one table, read by the launchers.

None of these rows has been measured yet. They are chosen so that every kernel fits the registers
and the shared memory of its architecture (``tests/triton/aot`` compiles each of them) and reaches
the tensor cores. ``pyeff tune`` finds the fastest of them for the device at hand.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from pyeff.triton_kernels import measured_tiles
from triton.runtime import driver

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tile(NamedTuple):
    """The block of work of one program, and how it is compiled.

    Attributes:
        rows: Rows of the result: pixels, or output channels in the weight gradient.
        cols: Columns of the result: channels.
        depth: Terms of the sum that are taken in at once.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# Kinds of arithmetic: "half" is float16 and bfloat16 with 32-bit sums, "tf32" is float32 rounded
# to 10 bits for the tensor cores, "ieee" is float32 on the ordinary units.
# Each list goes from much work per program to little.
_GEMM = {
    "half": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 32, 64, 4, 4),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 4, 3),
        Tile(64, 64, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
    ),
    "ieee": (
        Tile(64, 64, 16, 8, 2),
        Tile(32, 32, 16, 4, 2),
    ),
}
# The sum of the weight gradient runs over pixels: deeper blocks, fewer of them.
_GRAD_WEIGHT = {
    "half": (
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(32, 32, 64, 4, 3),
    ),
    "tf32": (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
    ),
    "ieee": (
        Tile(64, 64, 16, 8, 2),
        Tile(32, 32, 16, 4, 2),
    ),
}
# Channels by number: each element has an address of its own, which takes registers.
_GATHER = {
    "half": (Tile(64, 64, 64, 8, 3), Tile(32, 32, 64, 4, 4)),
    "tf32": (Tile(64, 64, 32, 8, 3), Tile(32, 32, 32, 4, 4)),
    "ieee": _GEMM["ieee"],
}
# A branch's image may be small, down to one pixel for a linear layer.
_BRANCH = {
    "half": (*_GEMM["half"], Tile(16, 64, 64, 4, 4)),
    "tf32": (*_GEMM["tf32"], Tile(16, 64, 32, 4, 4)),
    "ieee": (*_GEMM["ieee"], Tile(16, 32, 16, 4, 2)),
}
# Which rows are loaded is loaded itself: half of the stages are for that.
_BRANCH_GRAD_WEIGHT = {
    kind: tuple(t._replace(stages=5 if kind != "ieee" else t.stages) for t in rows)
    for kind, rows in _GRAD_WEIGHT.items()
}
# All channels of both convolutions of a pair (at most ``cols``) are one program's, and three blocks
# of the map between them.
_PAIR = {
    "half": (
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 128, 64, 8, 3),
    ),
    "tf32": (Tile(64, 64, 32, 8, 3),),
    "ieee": (Tile(16, 64, 16, 8, 2),),
}
_TASKS = {
    "gemm": _GEMM,
    "gather": _GATHER,
    "grad_weight": _GRAD_WEIGHT,
    "branch": _BRANCH,
    "branch_grad_weight": _BRANCH_GRAD_WEIGHT,
    "pair": _PAIR,
}
TILES: dict[tuple[str, int], dict[str, tuple[Tile, ...]]] = {
    (task, architecture): rows for task, rows in _TASKS.items() for architecture in (80, 90, 100)
}
# There mma.sync takes its factors from registers: larger blocks spill.
TILES["grad_weight", 80] = {**_GRAD_WEIGHT, "tf32": _GRAD_WEIGHT["tf32"][1:]}
# One row for all: the depth-wise kernels are bound by memory. Eight elements a thread, one load of
# 16 bytes for halves: with sixteen, ptxas spills where channels must be read one by one. 32 columns
# and not 64: four times eight rows of a warp share the weights that they load.
TILES["pair", 80] = {
    "half": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 8, 3)),
    "tf32": (Tile(32, 64, 32, 8, 3),),
    "ieee": _PAIR["ieee"],
}
DEPTHWISE = Tile(32, 32, 1, 4, 2)
# Triton's interpreter pays per operation, not per element: one or two large programs.
INTERPRETER = Tile(512, 64, 64, 1, 1)


class Limits(NamedTuple):
    """What the choice of a tile needs to know of a device.

    Attributes:
        architecture: Of 80, 90, 100 the newest that is not above the device's; 0: interpreter.
        processors: Multiprocessors.
        shared: Bytes of shared memory that one program may use.
        cache: Bytes of the L2 cache.
    """

    architecture: int
    processors: int
    shared: int
    cache: int


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> Limits:
    """The limits of a device; CPU tensors are for Triton's interpreter."""
    if device.type == "cpu":
        return Limits(0, 2, 0, 0)
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    architecture = max((a for a in (80, 90, 100) if a <= capability), default=80)
    shared = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Limits(architecture, properties.multi_processor_count, shared, properties.L2_cache_size)


def shared_bytes(tile: Tile, kind: str, task: str = "gemm") -> int:
    """Bytes of shared memory that the pipelined blocks of both operands take."""
    blocks = tile.stages
    if task == "branch_grad_weight":
        blocks = max(2, (tile.stages + 1) // 2)
    return (tile.rows + tile.cols) * tile.depth * blocks * (2 if kind == "half" else 4)


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of arithmetic, ``"half"``, ``"tf32"`` or ``"ieee"``, for a dtype and a precision."""
    return precision if dtype == torch.float32 else "half"


def product_precision(op: str, dtype: torch.dtype, precision: str | None) -> str:
    """How products are rounded: ``"tf32"`` or ``"ieee"``; float32 follows torch where it is None.

    Args:
        op: The operator, named in errors.
        dtype: Of the factors.
        precision: ``"tf32"``, ``"ieee"`` or None, which follows
            ``torch.backends.cudnn.conv.fp32_precision``.

    Raises:
        TypeError: There are no kernels for the dtype.
        ValueError: ``precision`` is unknown.
    """
    if dtype not in DTYPES:
        raise TypeError(
            f"{op}: the dtype must be float16, bfloat16 or float32 on the triton backend, "
            f"got {dtype}; the torch backend computes float64"
        )
    if precision is None:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at run time
        precision = "tf32" if convolutions.fp32_precision == "tf32" else "ieee"
    if precision not in ("tf32", "ieee"):
        raise ValueError(f"{op}: precision must be 'tf32' or 'ieee', got {precision!r}")
    return precision if dtype == torch.float32 else "ieee"


def overflows_cache(device: torch.device, size: int) -> bool:
    """Whether ``size`` bytes, with as many of other data, are more than the L2 cache holds."""
    return 2 * size > device_limits(device).cache


def choose(task: str, kind: str, device: torch.device, rows: int, cols: int, groups: int) -> Tile:
    """The tile that ``pyeff tune`` measured, or else the first of the table's that suits the shape.

    A tile of the table is passed over while it is at least twice as wide or as high as the result,
    gives fewer programs than the device has multiprocessors, or does not fit the device's shared
    memory.

    Args:
        task: ``"gemm"`` (forward and input gradient), ``"gather"`` (the same with channel
            numbers), ``"branch"`` (the same image by image), ``"grad_weight"`` or
            ``"branch_grad_weight"``; for ``"pair"`` see :func:`choose_pair`.
        kind: See :func:`arithmetic`.
        device: Where it runs.
        rows: Rows of the result.
        cols: Columns of the result, of one group.
        groups: How many such results.
    """
    limits = device_limits(device)
    if limits.architecture == 0:
        return INTERPRETER
    tuned = measured_tiles.find(device, measured_tiles.Asked(task, kind, rows, cols, groups))
    if tuned is not None:
        return Tile(*tuned)
    candidates = TILES[task, limits.architecture][kind]
    for tile in candidates:
        programs = -(-rows // tile.rows) * -(-cols // tile.cols) * groups
        fills = programs >= limits.processors and tile.cols < 2 * cols and tile.rows < 2 * rows
        if fills and shared_bytes(tile, kind, task) <= limits.shared:
            return tile
    return candidates[-1]


def fitting(task: str, kind: str, device: torch.device) -> list[Tile]:
    """The table's tiles that fit the device's shared memory; none for the interpreter."""
    limits = device_limits(device)
    if limits.architecture == 0:
        return []
    rows = TILES[task, limits.architecture][kind]
    return [tile for tile in rows if shared_bytes(tile, kind, task) <= limits.shared]


def widest_pair(dtype: torch.dtype, device: torch.device) -> int:
    """The most channels that both convolutions of a fused pair may have."""
    architecture = device_limits(device).architecture or 90  # the interpreter's limits are free
    rows = TILES["pair", architecture]["half" if dtype.itemsize == 2 else "ieee"]
    return max(tile.cols for tile in rows)


def choose_pair(
    kind: str, device: torch.device, tile: Tile | None, channels: int, lines: int, steps: int
) -> tuple[Tile, int]:
    """The tile of a fused pair, and how many steps along its lines a program walks.

    The first tile of the list that takes the channels and gives every multiprocessor a program
    whose segment has at least eight steps; else the last that takes the channels, with at least
    four, since each segment computes two pixels of the middle map more than it has.

    Args:
        kind: See :func:`arithmetic`.
        device: Where it runs.
        tile: Instead of the table's.
        channels: Of the wider convolution.
        lines: Rows of pixels ``dilation`` apart, of all images.
        steps: Pixels of a line.
    """
    limits = device_limits(device)
    if tile is None and limits.architecture == 0:
        tile = INTERPRETER
    candidates = [tile] if tile else TILES["pair", limits.architecture][kind]
    candidates = [t for t in candidates if t is tile or t.cols >= channels]
    for chosen in candidates:
        blocks = -(-lines // chosen.rows)
        segments = -(-limits.processors // blocks)
        if segments * 8 <= steps:
            break
    return chosen, max(4, -(-steps // segments))


def pixel_shares(device: torch.device, programs: int, pixels: int, depth: int) -> int:
    """Into how many shares the weight gradient's sum over pixels is split.

    Enough for two programs on each multiprocessor, but at least four blocks of ``depth`` pixels
    each: every share costs a float32 copy of the gradient and a term of the second sum.

    Args:
        device: Where it runs.
        programs: Programs without a split.
        pixels: Terms of the sum.
        depth: Terms that a program takes in at once.
    """
    shares = min(2 * device_limits(device).processors // programs, pixels // (4 * depth))
    return max(shares, 1)


def fit_depth(tile: Tile, terms: int) -> Tile:
    """The tile with its depth cut to the next power of two of ``terms``, at least 16."""
    return tile._replace(depth=min(tile.depth, max(16, 1 << (terms - 1).bit_length())))
