"""How a pair of convolutions is run: the one place that decides.

A model of the time that each form takes, from rates that were measured on the device that
``tables/cpu.json`` names; ``benchmarks/ops/factorized_forms.py`` measures them and compares. On a
GPU nothing was measured yet: there the fused kernel runs wherever it can and no large dilation
leaves its lines too short.
"""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.ops._dispatch import choose, forced_backend, measured_rates, winograd_allowed
from pyeff.ops._factorized_pair import FactorPair, is_vertical_first, taps_of

OP = "factorized_conv2d"
# Of F(m, 3), which multiplies m + 2 times where direct sums multiply 3 m times.
_WINOGRAD_OUTPUTS = {torch.float32: 4, torch.bfloat16: 2}


class Form(NamedTuple):
    """One way to run a pair."""

    name: str  # "fused" (one kernel), "two" (two with an epilogue each) or "torch"
    winograd: bool


class _Line(NamedTuple):
    """One of the two convolutions."""

    inputs: int
    outputs: int
    pixels: int  # of its result
    length: int  # of its result along its axis
    taps: int

    @property
    def gflop(self) -> float:
        return 2e-9 * self.pixels * self.inputs * self.outputs * self.taps

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.taps


def forward_form(
    backend: str, x: Tensor, w_first: Tensor, w_second: Tensor, pair: FactorPair
) -> Form:
    """The form of a forward call on a backend; without a forced one also that of torch."""
    if backend == "torch":
        return Form("torch", False)
    if backend == "triton":
        from pyeff.triton_kernels.factorized_conv2d import can_fuse

        height, width = pair.output_size(x.shape, taps_of(w_first))
        # Along its lines the fused kernel computes six pixels of the middle map for every four of
        # the result, and no fewer where a line has fewer.
        worth = (width if is_vertical_first(w_first) else height) > 3 * pair.dilation
        fused = worth and can_fuse(w_first, w_second, pair[:3])
        return Form("fused" if fused else "two", False)
    return min(
        estimates(x, w_first, w_second, pair, forced=forced_backend() is not None).items(),
        key=lambda item: item[1],
    )[0]


def backward_backend(x: Tensor) -> str:
    """The backend of all gradients of a pair, for the device and the dtype of ``x``.

    On the CPU the table of ``benchmarks/ops/factorized_backward.py`` says ATen for bfloat16 and our
    kernels for every other dtype.
    """
    return choose(OP, x, direction="backward")


def line_winograd(x: Tensor, weight: Tensor, pair: FactorPair) -> bool:
    """Whether a single line with a result of the size of ``x`` is faster so; for gradients.

    In bfloat16 never: inputs are rounded once more there.
    """
    outputs, inputs = weight.shape[:2]
    length = x.shape[2] if is_vertical_first(weight) else x.shape[3]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if x.dtype != torch.float32 or not _can_winograd(x, weight, pair):
        return False
    line = _Line(inputs, outputs, pixels, length, taps_of(weight))
    rates, group = measured_rates(OP, x), _WINOGRAD_OUTPUTS[x.dtype]
    return _seconds(line, pair, rates, group) < _seconds(line, pair, rates)


def estimates(
    x: Tensor, w_first: Tensor, w_second: Tensor, pair: FactorPair, *, forced: bool = False
) -> dict[Form, float]:
    """Seconds of every form that can run on the CPU; ``forced`` leaves torch out."""
    rates, threads = measured_rates(OP, x), torch.get_num_threads()
    lines = _lines(x, w_first, w_second, pair)
    result = {}
    for winograd in (False, True) if _can_winograd(x, w_first, pair) else (False,):
        group = _WINOGRAD_OUTPUTS[x.dtype] if winograd else 0
        kernels = sum(_seconds(line, pair, rates, group) for line in lines) / threads
        size = 8 if x.dtype == torch.float64 else 4  # of a packed weight
        packed = size * sum(line.weights for line in lines) * (group + 2 if winograd else 3) / 3
        # Both weights are read again for every row where the cache does not hold them.
        spilled = 1e-9 * max(0.0, packed - rates["cache_bytes"]) / rates["spill_gbyte_per_s"]
        result[Form("fused", winograd)] = kernels + spilled
        middle = 1e-9 * lines[0].pixels * lines[0].outputs * x.element_size()
        traffic = 2 * middle / rates["traffic_gbyte_per_s"]
        # Of a pair of single taps the lines have no axis of their own.
        if lines[0].taps > 1:
            result[Form("two", winograd)] = kernels + traffic + rates["call_s"]
    if not forced:
        gflop = sum(line.gflop for line in lines)
        result[Form("torch", False)] = (
            gflop / rates["torch_gflop_per_s"] / threads + rates["torch_s"]
        )
    return result


def _lines(x: Tensor, w_first: Tensor, w_second: Tensor, pair: FactorPair) -> tuple[_Line, _Line]:
    vertical, taps = is_vertical_first(w_first), taps_of(w_first)
    middle = pair.middle_size(x.shape, taps, vertical)
    result = pair.output_size(x.shape, taps)
    n, (outputs, inputs) = x.shape[0], w_second.shape[:2]
    axis = 0 if vertical else 1
    first = _Line(x.shape[1], inputs, n * middle[0] * middle[1], middle[axis], taps)
    second = _Line(inputs, outputs, n * result[0] * result[1], result[1 - axis], taps)
    return first, second


def _seconds(line: _Line, pair: FactorPair, rates: dict[str, float], group: int = 0) -> float:
    """Of one line on one thread; ``group`` is m of Winograd's F(m, 3), 0 for direct sums."""
    direct = line.gflop / rates["gflop_per_s"]
    if group == 0:
        return direct
    # Pixels ``dilation`` apart are computed m at a time: some of the last ones are not there.
    run = max(1, line.length // pair.dilation)
    filled = run / (group * ceil(run / group))
    transforms = line.pixels * (line.inputs + line.outputs) * rates["transform_s"]
    return direct * (group + 2) / (3 * group) / filled + transforms


def _can_winograd(x: Tensor, weight: Tensor, pair: FactorPair) -> bool:
    fits = x.dtype in _WINOGRAD_OUTPUTS and taps_of(weight) == 3 and pair.stride == 1
    return fits and winograd_allowed()
