"""Convolution networks that do less work per image and are really faster for it."""

# torch first: its OpenMP runtime is then the one that our kernels share (pyeff._C links it too).
import torch  # noqa: F401

from pyeff import models, nn, ops
from pyeff._C import version
from pyeff._info import info
from pyeff.checkpoint import load, save
from pyeff.ops import backend, clear_packed, isa, winograd

__all__ = [
    "backend",
    "clear_packed",
    "info",
    "isa",
    "load",
    "models",
    "nn",
    "ops",
    "save",
    "winograd",
]
__version__ = version
