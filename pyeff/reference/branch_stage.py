"""Ground truth for :func:`pyeff.ops.branch_stage`: short, slow, any dtype, any device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# kind, sources, tensors, options, activation, residual: see pyeff.ops._branch_steps.Step
Step = tuple[str, tuple[int, ...], tuple[Tensor | None, ...], Mapping[str, Any], str, int]


def branch_stage(
    x: Tensor,  # [N, C, H, W] or [N, F], or one for every pair, [N, k, ...]
    index: Tensor,  # [N, k]
    steps: Sequence[Step],
    output: int,
    *,
    vector: bool = False,  # x is [N, F] or [N, k, F]
) -> Tensor:  # [N, k, ...]
    """One pair after another, one step after another, each as torch computes it."""
    n, k = index.shape
    if x.dim() == (2 if vector else 4):
        x = x.unsqueeze(1).expand(-1, k, *x.shape[1:])
    if n * k == 0:
        empty = run_branch(x.flatten(0, 1), 0, steps, output)
        return empty.unflatten(0, (n, k))
    rows = [
        run_branch(x[i, j].unsqueeze(0), int(index[i, j]), steps, output)
        for i in range(n)
        for j in range(k)
    ]
    return torch.cat(rows).unflatten(0, (n, k))


def run_branch(x: Tensor, branch: int, steps: Sequence[Step], output: int) -> Tensor:
    """One branch on a batch ``[M, ...]``."""
    slots = [x]
    for kind, sources, tensors, options, activation, residual in steps:
        own = [None if t is None else t[branch] for t in tensors]
        y = run_step(kind, [slots[s] for s in sources], own, options)
        if residual >= 0:
            y = y + slots[residual]
        slots.append(ACTIVATE[activation](y))
    return slots[output]


ACTIVATE = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def run_step(
    kind: str, inputs: Sequence[Tensor], tensors: Sequence[Any], options: Mapping[str, Any]
) -> Tensor:
    """One step on batches ``[M, ...]`` with the parameters of one branch."""
    x = inputs[0]
    if kind == "conv2d":
        weight, bias = tensors
        top, bottom, left, right = options["padding"]
        x = F.pad(x, (left, right, top, bottom))
        stride, dilation = options["stride"], options["dilation"]
        return F.conv2d(x, weight, bias, stride, 0, dilation, options["groups"])
    if kind == "linear":
        return F.linear(x, *tensors)
    if kind == "scale_shift":
        scale, shift = (t.reshape(-1, *[1] * (x.dim() - 2)) for t in tensors)
        return x * scale + shift
    if kind == "add":
        return x + inputs[1]
    if kind == "concat":
        return torch.cat(list(inputs), dim=1)
    if kind == "flatten":
        return x.flatten(1)
    if kind == "activation":
        return x
    return pool(x, kind, options)


def pool(x: Tensor, kind: str, options: Mapping[str, Any]) -> Tensor:
    """``pool2d`` and ``adaptive_pool2d`` on a batch ``[M, C, H, W]``."""
    if kind == "adaptive_pool2d":
        adaptive = F.adaptive_avg_pool2d if options["average"] else F.adaptive_max_pool2d
        return adaptive(x, options["size"])
    kernel, stride, padding = options["kernel"], options["stride"], options["padding"]
    ceil_mode = bool(options["ceil_mode"])
    if options["average"]:
        include = bool(options["count_include_pad"])
        return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
    return F.max_pool2d(x, kernel, stride, padding, options["dilation"], ceil_mode)
