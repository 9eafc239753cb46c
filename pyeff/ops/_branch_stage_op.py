"""branch_stage as PyTorch sees it: a registered operator, its shape rule, and no gradient."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyeff.ops import _branch_stage_backends as backends
from pyeff.ops._branch_index import kernel_index
from pyeff.ops._branch_plan import BranchPlan
from pyeff.ops._branch_steps import OP
from pyeff.ops._register import register


def _forward_kernel(
    x: Tensor, index: Tensor, tensors: Sequence[Tensor], program: Sequence[int]
) -> Tensor:
    plan = BranchPlan.raised(tensors, program)
    index = kernel_index(OP, index, plan.branches)
    return backends.forward(x, index, plan, backends.call_of(x, index, plan))


def _forward_fake(
    x: Tensor, index: Tensor, tensors: Sequence[Tensor], program: Sequence[int]
) -> Tensor:
    plan = BranchPlan.raised(tensors, program)
    item = x.shape[-1 if plan.vector else -3 :]
    return backends.empty_output(x, (*index.shape, *plan.output_shape(item)))


def refuse_gradient() -> None:
    """Says that there is none."""
    raise NotImplementedError(
        f"{OP}: x and the plan's parameters must not need a gradient, since the stage is for "
        "inference; call it under torch.no_grad(), or the operators one by one"
    )


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    refuse_gradient()


def _flops(x: Any, index: Any, tensors: Any, program: Sequence[int], *, out_shape: Any) -> int:
    plan = BranchPlan.raised(tensors, program)  # shapes in place of tensors
    item = x[-1 if plan.vector else -3 :]
    return 2 * index[0] * index[1] * plan.multiply_adds(item)


forward_op = register(
    f"{OP}(Tensor x, Tensor index, Tensor[] tensors, int[] program) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
    flops=_flops,
    backward=_backward,
)
