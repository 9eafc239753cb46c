"""The multiple that channels are rounded up to, chosen by measured time."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyeff.measure import measure_latency

# What vector registers and tiles of matrix units hold.
MULTIPLES = (1, 4, 8, 16, 32)
_TIE = 0.02  # times nearer to each other than this are equal


def fastest(
    models: Mapping[int, nn.Module], inputs: tuple[Tensor, ...], *, repeats: int = 15
) -> tuple[int, dict[int, float]]:
    """The multiple with the shortest forward pass; among equals the smallest network.

    Args:
        models: by multiple, the networks.
        inputs: of one pass, on the device that counts.
        repeats: timed rounds, in each of which every network runs once.

    Returns:
        The multiple; and the median seconds of every multiple.
    """
    by_size: dict[tuple[Any, ...], int] = {}
    for multiple, model in sorted(models.items()):
        by_size.setdefault(tuple(tuple(p.shape) for p in model.parameters()), multiple)
    different = sorted(by_size.values())
    x = inputs[0]

    def run(model: nn.Module) -> Any:
        return lambda _: model(*inputs)

    modes = [(module, module.training) for n in different for module in models[n].modules()]
    try:
        for multiple in different:
            models[multiple].eval()
        times = measure_latency([run(models[n]) for n in different], x, repeats=repeats)
    finally:
        for module, training in modes:
            module.training = training
    seconds = dict(zip(different, times, strict=True))
    limit = min(times) * (1 + _TIE)
    return min(n for n, taken in seconds.items() if taken <= limit), seconds
