"""The operators: public functions over interchangeable backends."""

from pyeff.ops._dispatch import backend, isa
from pyeff.ops._packed import clear_packed
from pyeff.ops.nested_conv2d import nested_conv2d

__all__ = ["backend", "clear_packed", "isa", "nested_conv2d"]
