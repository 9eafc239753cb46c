"""A whole branch for every (image, branch) pair in one call."""

import torch
from torch import Tensor

from pyeff.ops import _branch_stage_backends as backends
from pyeff.ops._branch_args import require_one_per_route, route_index
from pyeff.ops._branch_index import kernel_index
from pyeff.ops._branch_plan import BranchPlan
from pyeff.ops._branch_stage_op import forward_op, refuse_gradient
from pyeff.ops._branch_steps import OP
from pyeff.ops._dispatch import forced_backend
from pyeff.ops._eager import is_plain
from pyeff.ops._tensor_args import check_tensor
from pyeff.ops.top_k_routes import Routes


def branch_stage(
    x: Tensor, routes: Routes | Tensor, plan: BranchPlan, *, validate: bool = False
) -> Tensor:
    r"""Runs the steps of a branch for every image and every branch that it takes.

    .. math:: y_{n,j} = \mathrm{branch}_{r_{n,j}}(x_n)

    On the CPU the maps between the steps never leave the cache. For inference only.

    Args:
        x: Input of the branches, ``[N, C, H, W]``, or one for each pair, ``[N, k, C, H, W]``; of a
            plan of vectors ``[N, F]`` or ``[N, k, F]``. Best with C innermost in memory.
        routes: The branches :math:`r`: Routes, or an int32 or int64 index ``[N, k]``. A branch may
            stand twice in a row.
        plan: The steps of a branch and the parameters of all branches. Their dtype is that of
            ``x``, or float32 for an ``x`` of half precision; the CPU's kernel computes in float32
            (float64 for float64) and rounds once, at the end.
        validate: Also checks the index's values on a GPU, which synchronises. On the CPU they are
            always checked.

    Returns:
        ``[N, k, C', H', W']``, C' innermost in memory, or ``[N, k, F']``; dtype and device of
        ``x``; aliases nothing.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together or a route names no branch.
        TypeError: If ``x`` or ``routes`` is no fitting tensor or ``plan`` no BranchPlan.
        NotImplementedError: If a gradient to ``x`` or a parameter would be recorded.

    Deterministic.

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
    Inference", CVPR 2018.

    Example:
        >>> plan = BranchPlan(branches=20, in_channels=32)
        >>> a = plan.conv2d(0, torch.randn(20, 16, 32, 3, 3), stride=2, padding=1)
        >>> _ = plan.activation(a, "relu")
        >>> index = torch.tensor([[3, 7], [0, 3]])  # two of 20 branches for each image
        >>> branch_stage(torch.randn(2, 32, 16, 16), index, plan).shape
        torch.Size([2, 2, 16, 8, 8])
    """
    if not isinstance(plan, BranchPlan):
        raise TypeError(f"{OP}: plan must be a BranchPlan, got {type(plan).__name__}")
    index = routes.index if isinstance(routes, Routes) else routes
    tensors, program = plan.lower()
    first = tensors[0] if tensors else x
    plain = type(index) is Tensor and not validate and is_plain(x, first, None)
    call = _known_call(x, index, plan) if plain else None
    if call is None:
        _check(x, routes, plan, validate)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        refuse_gradient()
    if call is None:
        result: Tensor = forward_op(x, index, tensors, program)
        return result
    return backends.forward(x, kernel_index(OP, index, plan.branches), plan, call)


_MAX_CALLS = 256


def _known_call(x: Tensor, index: Tensor, plan: BranchPlan) -> backends.Call:
    """The call; checking it again costs more than a small branch.

    The key holds everything that the checks and the choice of a backend depend on.
    """
    key = (x.shape, x.dtype, x.device, index.shape, index.dtype, index.device, forced_backend())
    call: backends.Call | None = plan.calls.get(key)
    if call is None:
        _check(x, index, plan, False)
        call = backends.call_of(x, index, plan)
        if len(plan.calls) >= _MAX_CALLS:
            plan.calls.clear()
        plan.calls[key] = call
    return call


def _check(x: Tensor, routes: Routes | Tensor, plan: BranchPlan, validate: bool) -> None:
    vectors, maps = {2: "[N, F]", 3: "[N, k, F]"}, {4: "[N, C, H, W]", 5: "[N, k, C, H, W]"}
    ranks = vectors if plan.vector else maps
    check_tensor(OP, "x", x, ranks)
    for t in plan.lower()[0][:1]:
        if t.device != x.device:
            raise ValueError(
                f"{OP}: plan must have its parameters on the device of x, {x.device}, "
                f"got {t.device}"
            )
        half = x.dtype in (torch.float16, torch.bfloat16)
        if t.dtype != x.dtype and not (half and t.dtype == torch.float32):
            raise ValueError(
                f"{OP}: plan must have parameters of the dtype of x, {x.dtype}, got {t.dtype}"
            )
    index = route_index(OP, routes, x, plan.branches, validate=validate)
    if x.dim() == max(ranks):
        require_one_per_route(OP, "one input", x, index)
    plan.output_shape(x.shape[-1 if plan.vector else -3 :])
