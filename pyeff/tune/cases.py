"""The calls that are measured: every operator at a few shapes, in every direction."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import ops

CHANNELS = (16, 64, 256)
# Images and their side, in pixels.
IMAGES = ((1, 8), (1, 32), (16, 32))
BRANCHES, TAKEN = 8, 2


class Call(NamedTuple):
    """One operator on given tensors.

    Attributes:
        run: forward.
        x: the input, by whose size a backend is chosen.
        inputs: what grad_input is of.
        weights: what grad_weight is of.
    """

    run: Callable[[], Tensor]
    x: Tensor
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


class Case(NamedTuple):
    """An operator at one shape.

    Attributes:
        op: the operator.
        dtype: of all its tensors.
        channels: of its input.
        images: how many.
        side: of an image in pixels.
    """

    op: str
    dtype: torch.dtype
    channels: int
    images: int
    side: int

    def call(self, device: torch.device) -> Call:
        """The operator on fresh tensors, which record gradients."""
        return _BUILDERS[self.op](self, device)

    def _map(self, device: torch.device) -> Tensor:
        x = self._new(device, self.images, self.channels, self.side, self.side)
        return x.contiguous(memory_format=torch.channels_last)

    def _new(self, device: torch.device, *shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(self.dtype)

    def _index(self, device: torch.device) -> Tensor:
        scores = torch.rand(self.images, BRANCHES, device=device)
        return ops.top_k_routes(scores, TAKEN).index


def cases(
    operators: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    channels: tuple[int, ...] = CHANNELS,
    images: tuple[tuple[int, int], ...] = IMAGES,
) -> Iterator[Case]:
    """All combinations; what runs on vectors is measured once for each number of images."""
    for op in operators:
        for dtype in dtypes:
            for width in channels:
                seen = set()
                for count, side in images:
                    size = (count, 1 if op in _ON_VECTORS else side)
                    if size not in seen:
                        seen.add(size)
                        yield Case(op, dtype, width, *size)


def _parameter(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def _nested(case: Case, device: torch.device) -> Call:
    # Half of the output channels of a weight that has twice the input's: a level in the middle.
    x, c = _parameter(case._map(device)), case.channels
    weight = _parameter(case._new(device, 2 * c, 2 * c, 3, 3))

    def run() -> Tensor:
        return ops.nested_conv2d(x, weight, in_range=(0, c), out_range=(0, c), padding=1)

    return Call(run, x, (x,), (weight,))


def _branches(case: Case, device: torch.device) -> Call:
    x, c = _parameter(case._map(device)), case.channels
    weight = _parameter(case._new(device, BRANCHES, c, c, 3, 3))
    index = case._index(device)

    def run() -> Tensor:
        return ops.branch_conv2d(x, weight, None, index, padding=1)

    return Call(run, x, (x,), (weight,))


def _combine(case: Case, device: torch.device) -> Call:
    y = _parameter(case._new(device, case.images, TAKEN, case.channels))
    projection = _parameter(case._new(device, BRANCHES, 100, case.channels))
    scores = torch.rand(case.images, BRANCHES, device=device)
    routes = ops.top_k_routes(scores, TAKEN, weights="softmax")

    def run() -> Tensor:
        return ops.combine(y, projection, None, routes)

    return Call(run, y, (y,), (projection,))


def _routes(case: Case, device: torch.device) -> Call:
    scores = _parameter(case._new(device, case.images, case.channels))

    def run() -> Tensor:
        return ops.top_k_routes(scores, TAKEN, weights="softmax").weight

    return Call(run, scores, (scores,), ())


def _pair(case: Case, device: torch.device) -> Call:
    x, c = _parameter(case._map(device)), case.channels
    first, second = (_parameter(case._new(device, c, c, *k)) for k in ((3, 1), (1, 3)))

    def run() -> Tensor:
        return ops.factorized_conv2d(x, first, None, second, None, outer="relu")

    return Call(run, x, (x,), (first, second))


_ON_VECTORS = ("combine", "top_k_routes")
_BUILDERS: dict[str, Callable[[Case, torch.device], Call]] = {
    "nested_conv2d": _nested,
    "branch_conv2d": _branches,
    "combine": _combine,
    "top_k_routes": _routes,
    "factorized_conv2d": _pair,
}
OPERATORS = tuple(_BUILDERS)
