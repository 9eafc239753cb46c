"""The backends of branch_stage; every function takes checked arguments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import _C
from pyeff.ops import _branch_stage_cuda as cuda
from pyeff.ops._branch_native import NativePlan, known, native_plan
from pyeff.ops._branch_plan import BranchPlan
from pyeff.ops._branch_steps import OP, Shape, Step
from pyeff.ops._dispatch import choose
from pyeff.reference.branch_stage import ACTIVATE, pool
from pyeff.reference.branch_stage import branch_stage as reference


class Call(NamedTuple):
    """What a call needs beside its tensors; depends on their shapes, dtypes and devices only."""

    backend: str
    shape: tuple[int, ...]  # of y
    strides: tuple[int, ...]


def call_of(x: Tensor, index: Tensor, plan: BranchPlan) -> Call:
    """The call for tensors of these shapes, after every check but that of the index's values."""
    shape = plan.output_shape(tuple(x.shape[-1 if plan.vector else -3 :]))
    return Call(choose(OP, x), *output_layout(index.shape[0], index.shape[1], shape))


def forward(x: Tensor, index: Tensor, plan: BranchPlan, call: Call) -> Tensor:
    """y [N, k, ...], C innermost, for an int32 index whose values are checked."""
    name = call.backend
    if name in ("cpp", "cuda"):
        y = x.new_empty_strided(call.shape, call.strides)
        if index.shape[0] == 0:  # torch gives an empty batch no other layout
            return y
        x = _channels_innermost(x, plan.vector)
        if name == "cuda":
            return cuda.forward(x, index, plan, y)
        native = _native(plan, x.dtype)
        threads = torch.get_num_threads()
        _C.branch_stage_forward(native.program, x, index, native.packed, y, threads)
        return y
    tensors, _ = plan.lower()
    # Parameters may be float32 where x is of half precision.
    wide = x.to(tensors[0].dtype) if tensors else x
    if name == "reference":
        y = reference(wide, index, plan.steps, plan.output, vector=plan.vector)
    else:
        y = compose(
            wide, index, plan, _branch_conv2d(index) if name == "triton" else grouped_conv2d
        )
    y = y.to(x.dtype)
    return y if y.stride() == call.strides else empty_output(y, call.shape).copy_(y)


def output_layout(n: int, k: int, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a result: [n, k, C, H, W] with C innermost, or [n, k, F]."""
    if len(shape) == 1:
        return (n, k, *shape), (k * shape[0], shape[0], 1)
    c, h, w = shape
    return (n, k, c, h, w), (k * h * w * c, h * w * c, 1, w * c, c)


def _native(plan: BranchPlan, dtype: torch.dtype) -> NativePlan:
    native = None if plan.native is None else plan.native.get()
    if native is None:
        tensors, integers = plan.lower()
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        native = native_plan(tensors, integers, computed)
        if not any(t.is_inference() for t in tensors):
            plan.native = known(tensors, native)
    return native


def _channels_innermost(x: Tensor, vector: bool) -> Tensor:
    """``x`` itself where its channels lie side by side, else a copy."""
    channel = -1 if vector else -3
    if x.stride(channel) == 1 or x.shape[channel] == 1:
        return x
    if vector:
        return x.contiguous()
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def empty_output(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised [n, k, C, H, W] with C innermost, or [n, k, F]."""
    return like.new_empty_strided(*output_layout(shape[0], shape[1], shape[2:]))


# --- torch: every step for all pairs at once ------------------------------------------------------

Conv = Callable[[Tensor, Step, Tensor], Tensor]


def compose(x: Tensor, index: Tensor, plan: BranchPlan, conv2d: Conv) -> Tensor:
    """The plan in PyTorch's operators; slots are [N * k, ...]."""
    n, k = index.shape
    if x.dim() == (2 if plan.vector else 4):
        x = x.unsqueeze(1).expand(-1, k, *x.shape[1:])
    branches = index.reshape(-1).long()
    slots = [x.reshape(n * k, *x.shape[2:])]
    for step in plan.steps:
        y = _run_step(step, [slots[s] for s in step.sources], branches, conv2d)
        if step.residual >= 0:
            y = y + slots[step.residual]
        slots.append(ACTIVATE[step.activation](y))
    return slots[plan.output].unflatten(0, (n, k))


def _branch_conv2d(index: Tensor) -> Conv:
    """Convolutions by pyeff's own operator, which runs on the backend that is forced."""
    from pyeff.ops.branch_conv2d import branch_conv2d

    def conv2d(x: Tensor, step: Step, branches: Tensor) -> Tensor:
        weight, bias = step.tensors
        assert weight is not None
        options = step.options
        top, bottom, left, right = options["padding"]
        y = branch_conv2d(
            F.pad(x, (left, right, top, bottom)).unflatten(0, index.shape),
            weight,
            bias,
            index,
            stride=options["stride"],
            dilation=options["dilation"],
            groups=options["groups"],
        )
        return y.flatten(0, 1)

    return conv2d


def _run_step(step: Step, inputs: Sequence[Tensor], branches: Tensor, conv2d: Conv) -> Tensor:
    x = inputs[0]
    if step.kind == "conv2d":
        return conv2d(x, step, branches)
    own: list[Any] = [None if t is None else t[branches] for t in step.tensors]
    if step.kind == "linear":
        weight, bias = own
        y = torch.bmm(weight, x.unsqueeze(2)).squeeze(2)
        return y if bias is None else y + bias
    if step.kind == "scale_shift":
        scale, shift = (t.reshape(*t.shape, *[1] * (x.dim() - 2)) for t in own)
        return x * scale + shift
    if step.kind == "add":
        return x + inputs[1]
    if step.kind == "concat":
        return torch.cat(list(inputs), dim=1)
    if step.kind == "flatten":
        return x.flatten(1)
    if step.kind == "activation":
        return x
    return pool(x, step.kind, step.options)


def grouped_conv2d(x: Tensor, step: Step, branches: Tensor) -> Tensor:
    """[M, O, H', W'] from [M, C, H, W]: gathered weights and one convolution of M * g groups."""
    weight, bias = step.tensors
    assert weight is not None
    options = step.options
    top, bottom, left, right = options["padding"]
    padding = (top, left)
    if top != bottom or left != right:
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    stride, dilation, groups = options["stride"], options["dilation"], options["groups"]
    pairs = x.shape[0]
    if pairs == 0:  # a convolution must have at least one group
        return F.conv2d(x, weight[0], None, stride, padding, dilation, groups)
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight[branches].flatten(0, 1),
        None if bias is None else bias[branches].flatten(),
        stride,
        padding,
        dilation,
        pairs * groups,
    )
    return y.reshape(pairs, -1, *y.shape[2:])
