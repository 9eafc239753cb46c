"""The operators: public functions over interchangeable backends."""

from pyeff.ops._branch_plan import BranchPlan
from pyeff.ops._dispatch import backend, isa, winograd
from pyeff.ops._packed import clear_packed
from pyeff.ops.branch_conv2d import branch_conv2d
from pyeff.ops.branch_linear import branch_linear
from pyeff.ops.branch_stage import branch_stage
from pyeff.ops.combine import combine
from pyeff.ops.factorized_conv2d import factorized_conv2d
from pyeff.ops.nested_conv2d import nested_conv2d
from pyeff.ops.top_k_routes import Routes, top_k_routes

__all__ = [
    "BranchPlan",
    "Routes",
    "backend",
    "branch_conv2d",
    "branch_linear",
    "branch_stage",
    "clear_packed",
    "combine",
    "factorized_conv2d",
    "isa",
    "nested_conv2d",
    "top_k_routes",
    "winograd",
]
