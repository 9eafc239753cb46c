"""The operators: public functions over interchangeable backends."""

from pyeff.ops.nested_conv2d import nested_conv2d

__all__ = ["nested_conv2d"]
