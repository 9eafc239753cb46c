"""branch_stage on the CUDA kernel, and the parameters in the form in which it reads them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import _C as native
from pyeff.ops._branch_native import NativePlan, native_plan
from pyeff.ops._branch_plan import BranchPlan
from pyeff.ops._branch_steps import Step, decode

HALVES = (torch.float16, torch.bfloat16)


def forward(x: Tensor, index: Tensor, plan: BranchPlan, y: Tensor) -> Tensor:
    """Writes y [N, k, ...], C innermost, for x with its channels side by side.

    Raises:
        NotImplementedError: If the maps of a branch do not fit into a block's shared memory, or
            it has too many steps.
    """
    tensors, integers = plan.lower()
    stage = _packed(tensors, tuple(integers), x)
    weights, vectors = stage.packed, stage.vectors
    assert vectors is not None
    # A plan without parameters has empty ones, on the CPU.
    native.branch_stage_forward_cuda(
        stage.program, x, index, weights.to(x.device), vectors.to(x.device), y
    )
    return y


def _packed(tensors: Sequence[Tensor], integers: tuple[int, ...], x: Tensor) -> NativePlan:
    """The packed parameters; within a CUDA graph packed by it, since kept ones may be freed."""
    if not x.is_cuda:  # the emulation
        return native_plan(tensors, integers, x.dtype, pack)
    if torch.cuda.is_current_stream_capturing():
        return pack(tensors, integers, x.dtype)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return native_plan(tensors, integers, x.dtype, pack, stream)


def pack(tensors: Sequence[Tensor], integers: tuple[int, ...], dtype: torch.dtype) -> NativePlan:
    """The parameters of all branches as csrc/cuda/branch_stage_layout.h describes them.

    Args:
        tensors: The parameters of the steps, on one device.
        integers: The program.
        dtype: Of x.
    """
    header, steps = decode([t.detach() for t in tensors], integers)
    branches = header[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    like = tensors[0] if tensors else torch.empty(0)
    weights = [like.new_empty((branches, 0), dtype=dtype)]
    vectors = [like.new_empty((branches, 0), dtype=wide)]
    for step in steps:
        if step.kind in ("conv2d", "linear"):
            weights.append(_weight(step, dtype).to(dtype))
        vectors += [v.to(wide) for v in _vectors(step)]
    program = native.BranchStageProgram(list(integers))
    return NativePlan(program, torch.cat(weights, dim=1), torch.cat(vectors, dim=1))


def _weight(step: Step, dtype: torch.dtype) -> Tensor:
    """[B, elements] of a convolution's or linear step's weight."""
    weight = step.tensors[0]
    assert weight is not None
    if step.kind == "linear":
        weight = weight[..., None, None]
    branches, outputs, channels = weight.shape[:3]
    if dtype not in HALVES or step.options.get("groups", 1) > 1:
        # [B, taps, C / groups, O filled up to a multiple of 4]
        filled = F.pad(weight.permute(0, 3, 4, 2, 1), (0, -outputs % 4))
        return filled.reshape(branches, -1)
    # [B, O / 8, 8, C / 16, 2, 4, 2, taps]: lane 4 o + t of a warp reads the channels
    # 2 t + {0, 1, 8, 9} of output o.
    filled = F.pad(weight.flatten(3), (0, 0, 0, -channels % 16, 0, -outputs % 8))
    blocks = filled.unflatten(2, (-1, 2, 4, 2)).unflatten(1, (-1, 8))
    return blocks.permute(0, 1, 7, 3, 2, 5, 4, 6).reshape(branches, -1)


def _vectors(step: Step) -> list[Tensor]:
    """[B, C] of the bias, or of scale and shift, filled up to a multiple of 8 with zeros."""
    if step.kind == "scale_shift":
        given = [t for t in step.tensors if t is not None]
    elif step.kind in ("conv2d", "linear"):
        weight, bias = step.tensors
        assert weight is not None
        given = [weight.new_zeros(weight.shape[:2]) if bias is None else bias]
    else:
        return []
    return [F.pad(t, (0, -t.shape[1] % 8)) for t in given]
