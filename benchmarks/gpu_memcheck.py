"""Small calls of every CUDA kernel, in which `make gpu` has compute-sanitizer look for stray reads.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/gpu_memcheck.py

Odd sizes, so that tiles end beyond the maps, and channels that are and are not whole vectors.
Compares nothing: the tests do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pyeff
from pyeff import nn, ops

DTYPES = (torch.float32, torch.bfloat16)
# Random numbers of a shape, whose gradient is asked for.
Leaf = Callable[..., Tensor]


def run_all(device: str) -> None:
    """Runs every operator forward and, where it has gradients, backward."""
    for dtype in DTYPES:
        for channels in (8, 5):
            for operator in (nested, branches, pair, stage):
                run(operator, channels, dtype, device)


def run(
    operator: Callable[[int, Leaf], Tensor], channels: int, dtype: torch.dtype, device: str
) -> None:
    """One operator."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    with pyeff.backend("cuda"):
        y = operator(channels, leaf)
        if y.requires_grad:
            y.float().square().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{operator.__name__}, {channels} channels, {dtype}: done", flush=True)


def nested(channels: int, leaf: Leaf) -> Tensor:
    """Part of a layer, a depth-wise one, and sums so long that blocks share their terms."""
    x = leaf(3, channels, 7, 9)
    options: dict[str, Any] = {"in_range": (2, 2 + channels), "out_range": (1, 10), "padding": 1}
    y = ops.nested_conv2d(x, leaf(12, 16, 3, 3), leaf(12), **options)
    z = ops.nested_conv2d(x, leaf(channels, 1, 3, 3), None, stride=2, groups=channels)
    deep = ops.nested_conv2d(leaf(1, 1024, 5, 5), leaf(channels, 1024, 1, 1), None)
    wide = ops.nested_conv2d(leaf(3, 16, 31, 19), leaf(channels, 16, 1, 1), None)
    return torch.cat([part.flatten() for part in (y, z, deep, wide)])


def branches(channels: int, leaf: Leaf) -> Tensor:
    """Two of four branches, with and without groups, and what they gave combined."""
    routes = ops.top_k_routes(leaf(3, 4), 2, weights="softmax")
    x = leaf(3, channels, 7, 9)
    y = ops.branch_conv2d(x, leaf(4, 10, channels, 3, 3), leaf(4, 10), routes)
    z = ops.branch_conv2d(y, leaf(4, 10, 2, 3, 3), leaf(4, 10), routes, groups=5, stride=2)
    return ops.combine(z.mean((3, 4)), leaf(4, 6, 10), leaf(6), routes)


def pair(channels: int, leaf: Leaf) -> Tensor:
    """Both convolutions in one kernel, dilated, and one after the other."""
    x, weights = leaf(2, channels, 11, 13), (leaf(channels, channels, 3, 1), leaf(channels))
    weights += (leaf(channels, channels, 1, 3), leaf(channels))
    with torch.no_grad():
        ops.factorized_conv2d(x, *weights, inner="relu", padding=2, dilation=2)
    return ops.factorized_conv2d(x, *weights, inner="relu", padding=1, stride=2)


def stage(channels: int, leaf: Leaf) -> Tensor:
    """Whole branches in one call, which is for inference."""
    template = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 12, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(12),
        torch.nn.ReLU(),
        torch.nn.Conv2d(12, 10, 3, stride=2, padding=1),
    )
    scores, x = leaf(3, 4), leaf(3, channels, 9, 7)
    module = nn.Branches(template, 4).to(x.device, x.dtype).eval()
    with torch.no_grad():
        y: Tensor = module(x, ops.top_k_routes(scores, 2))
    return y


if __name__ == "__main__":
    run_all("cuda")
