"""The backends of factorized_conv2d, each with a forward and a backward.

Every function takes checked arguments. The backward is that of the two convolutions and the inner
activation alone; what follows them is undone by ``_factorized_op``, for all backends alike.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.ops import _factorized_torch as aten
from pyeff.ops._conv_args import as_channels_last
from pyeff.ops._dispatch import choose
from pyeff.ops._factorized_choice import OP, backward_backend, forward_form
from pyeff.ops._factorized_conv2d_cuda import backward as cuda_backward
from pyeff.ops._factorized_conv2d_cuda import forward as cuda_forward
from pyeff.ops._factorized_cpp import CppCall, cpp_call
from pyeff.ops._factorized_cpp import backward as cpp_backward
from pyeff.ops._factorized_cpp import forward as cpp_forward
from pyeff.ops._factorized_pair import BackwardCall, FactorPair
from pyeff.reference.factorized_conv2d import factorized_conv2d as reference

Grads = tuple[Tensor | None, ...]


class Tensors(NamedTuple):
    """The tensor arguments, in the order of the schema."""

    x: Tensor  # [N, C, H, W]
    w_first: Tensor  # [L, C, n, 1] or [L, C, 1, n]
    b_first: Tensor | None  # [L]
    w_second: Tensor  # [F, L, 1, n] or [F, L, n, 1]
    b_second: Tensor | None  # [F]
    scale: Tensor | None  # [F]
    shift: Tensor | None  # [F]
    residual: Tensor | None  # [N, F, H', W']


def forward(tensors: Tensors, pair: FactorPair, *, recording: bool = False) -> Tensor:
    """y [N, F, H', W'], channels_last; ``recording`` says that a weight gradient will follow."""
    x, w_first, b_first, w_second, b_second, scale, shift, residual = tensors
    first, second, epilogue = (w_first, b_first), (w_second, b_second), (scale, shift, residual)
    name = choose(OP, x, direction="train" if recording else "forward")
    if name == "reference":
        return by_reference(tensors, pair)
    if name == "cuda":
        return cuda_forward(pair, *tensors)
    form = forward_form(name, x, w_first, w_second, pair)
    if recording and x.dtype == torch.bfloat16:
        form = form._replace(winograd=False)  # training would feel what it rounds once more
    if form.name == "torch":
        return aten.forward(x, first, second, epilogue, pair)
    if name == "cpp":
        call = cpp_call(x, w_first, w_second, pair, form)
        return cpp_forward(call, *tensors, recording=recording)
    kernels = _triton()
    after = kernels.Epilogue(b_second, *epilogue, pair.outer)
    fused = form.name == "fused"
    y: Tensor = kernels.forward(
        as_channels_last(x), *first, w_second, after, pair[:3], pair.inner, fused=fused
    )
    return y


def backward(call: BackwardCall) -> Grads:
    """Gradients of x, w_first, b_first, w_second and b_second, those that are wanted."""
    name = backward_backend(call.x)
    if name in ("torch", "reference"):
        return aten.backward(call)
    if name == "cpp":
        return cpp_backward(call)
    if name == "cuda":
        return cuda_backward(call)
    grad, x, *weights, pair, wanted = call
    maps = as_channels_last(grad), as_channels_last(x)
    gradients: Grads = _triton().backward(*maps, *weights, pair[:3], pair.inner, wanted)
    return gradients


class Call(NamedTuple):
    """A checked call: what to run, and the cpp backend's form of it where that will run."""

    pair: FactorPair
    cpp: CppCall | None


def planned(tensors: Tensors, pair: FactorPair) -> Call:
    """The call without gradients for tensors of these shapes."""
    x, w_first, w_second = tensors.x, tensors.w_first, tensors.w_second
    if choose(OP, x) != "cpp":
        return Call(pair, None)
    form = forward_form("cpp", x, w_first, w_second, pair)
    return Call(pair, None if form.name == "torch" else cpp_call(x, w_first, w_second, pair, form))


def by_reference(tensors: Tensors, pair: FactorPair) -> Tensor:
    """The reference, channels_last; autograd differentiates it, in every way."""
    y = compose(tensors, pair)
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def compose(tensors: Tensors, pair: FactorPair) -> Tensor:
    """The reference for one pair."""
    x, w_first, b_first, w_second, b_second, scale, shift, residual = tensors
    return reference(
        x,
        w_first,
        b_first,
        w_second,
        b_second,
        stride=pair.stride,
        padding=pair.padding,
        dilation=pair.dilation,
        inner=pair.inner,
        scale=scale,
        shift=shift,
        residual=residual,
        outer=pair.outer,
    )


def _triton() -> ModuleType:
    from pyeff.triton_kernels import factorized_conv2d as kernels  # only where it is asked for

    return kernels
