"""The backends of nested_conv2d, each with a forward, an input and a weight gradient.

Every function takes checked arguments: the channel selection of a side is (lo, hi) or a 1-D int64
tensor, padding is (top, bottom, left, right).
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff import _C
from pyeff.ops import _nested_conv2d_cuda
from pyeff.ops._aten_backward import convolution_backward
from pyeff.ops._conv_args import (
    Pair,
    Sides,
    as_channels_last,
    empty_channels_last,
    output_size,
)
from pyeff.ops._dispatch import choose
from pyeff.ops._packed import packed_weight
from pyeff.reference.nested_conv2d import nested_conv2d as reference

OP = "nested_conv2d"
Selection = Pair | Tensor


class Conv(NamedTuple):
    """What to select and where the kernel lies; everything but the tensors themselves."""

    in_selection: Selection
    out_selection: Selection
    stride: Pair
    padding: Sides
    dilation: Pair
    groups: int

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """[N, o, H', W'] for x [N, i, H, W]."""
        top, bottom, left, right = self.padding
        kernel_h, kernel_w = weight.shape[2:]
        return (
            x.shape[0],
            count(self.out_selection),
            output_size(x.shape[2], kernel_h, self.stride[0], top, bottom, self.dilation[0]),
            output_size(x.shape[3], kernel_w, self.stride[1], left, right, self.dilation[1]),
        )


def count(selection: Selection) -> int:
    """How many channels are selected."""
    if isinstance(selection, Tensor):
        return selection.shape[0]
    return selection[1] - selection[0]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, recording: bool = False
) -> Tensor:
    """y [N, o, H', W'], channels_last; ``recording`` says that a weight gradient will follow."""
    name = choose(OP, x, direction="train" if recording else "forward")
    if name == "cpp":
        call = cpp_call(x, weight, conv)
        return cpp_forward(call, x, weight, bias, *_indices(conv), recording)
    if name == "triton":
        return _triton().forward(as_channels_last(x), weight, bias, *conv)
    if name == "cuda":
        return _nested_conv2d_cuda.forward(x, weight, bias, conv.output_shape(x, weight), conv)
    return _torch_forward(x, weight, bias, conv)


def compose(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """The reference for one Conv: PyTorch's own operators, differentiable in every way."""
    inputs, outputs = conv.in_selection, conv.out_selection
    return reference(
        x,
        weight,
        bias,
        in_range=None if isinstance(inputs, Tensor) else inputs,
        out_range=None if isinstance(outputs, Tensor) else outputs,
        in_index=inputs if isinstance(inputs, Tensor) else None,
        out_index=outputs if isinstance(outputs, Tensor) else None,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


def grad_input(grad_y: Tensor, weight: Tensor, height: int, width: int, conv: Conv) -> Tensor:
    """Gradient of x [N, i, height, width], channels_last."""
    name = choose(OP, grad_y, direction="grad_input")
    shape = (grad_y.shape[0], count(conv.in_selection), height, width)
    if name == "cpp":
        grad_x = empty_channels_last(grad_y, *shape)
        _C.nested_conv2d_grad_input(
            as_channels_last(grad_y), weight, grad_x, *_indices(conv), _problem(conv)
        )
        return grad_x
    if name == "triton":
        return _triton().grad_input(as_channels_last(grad_y), weight, shape, *conv)
    if name == "cuda":
        return _nested_conv2d_cuda.grad_input(grad_y, weight, shape, conv)
    x = empty_channels_last(grad_y, *shape)  # only its shape is read
    return _torch_gradients(grad_y, x, weight, conv, (True, False))[0]


def grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...],
    weight_strides: tuple[int, ...],
    conv: Conv,
) -> Tensor:
    """Gradient of the full weight [O, I / groups, kh, kw], zero outside of the selection."""
    name = choose(OP, x, direction="grad_weight")
    if name == "cpp":
        result = x.new_empty_strided(weight_shape, weight_strides)
        _C.nested_conv2d_grad_weight(
            as_channels_last(grad_y), as_channels_last(x), result, *_indices(conv), _problem(conv)
        )
        return result
    if name == "triton":
        result = _triton().grad_weight(
            as_channels_last(grad_y), as_channels_last(x), weight_shape, *conv
        )
        if result.stride() == weight_strides:
            return result
        return x.new_empty_strided(weight_shape, weight_strides).copy_(result)
    if name == "cuda":
        return _nested_conv2d_cuda.grad_weight(grad_y, x, weight_shape, weight_strides, conv)
    weight = x.new_empty_strided(weight_shape, weight_strides)
    part = _torch_gradients(grad_y, x, weight, conv, (False, True))[1]
    return _place(part, weight_shape, weight_strides, conv)


# --- cpp ------------------------------------------------------------------------------------------


class CppCall(NamedTuple):
    """What a forward call of the cpp backend needs beside its tensors; depends on shapes only."""

    shape: tuple[int, ...]  # of y
    strides: tuple[int, ...]
    problem: tuple[int, ...]
    groups: int


def cpp_call(x: Tensor, weight: Tensor, conv: Conv) -> CppCall:
    """The call for tensors of these shapes and the present number of threads."""
    n, c, h, w = conv.output_shape(x, weight)
    return CppCall((n, c, h, w), (h * w * c, 1, w * c, c), _problem(conv), conv.groups)


def cpp_forward(
    call: CppCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    recording: bool = False,
) -> Tensor:
    """Forward on the CPU kernels."""
    y = x.new_empty_strided(call.shape, call.strides)
    packed = None if recording else packed_weight(weight, call.groups)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.nested_conv2d_forward(
        as_channels_last(x), weight, packed, bias, y, in_index, out_index, call.problem
    )
    return y


def _indices(conv: Conv) -> tuple[Tensor | None, Tensor | None]:
    inputs, outputs = conv.in_selection, conv.out_selection
    return (
        inputs if isinstance(inputs, Tensor) else None,
        outputs if isinstance(outputs, Tensor) else None,
    )


def _problem(conv: Conv) -> tuple[int, ...]:
    inputs, outputs = conv.in_selection, conv.out_selection
    top, _, left, _ = conv.padding
    return (
        0 if isinstance(inputs, Tensor) else inputs[0],
        count(inputs),
        0 if isinstance(outputs, Tensor) else outputs[0],
        count(outputs),
        *conv.stride,
        top,
        left,
        *conv.dilation,
        conv.groups,
        torch.get_num_threads(),
    )


# --- torch ----------------------------------------------------------------------------------------


def _torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    y = compose(as_channels_last(x), weight, bias, conv)
    out = empty_channels_last(y, *y.shape)
    if y.stride() == out.stride():
        return y
    return out.copy_(y)


def _part(weight: Tensor, conv: Conv) -> Tensor:
    outputs = conv.out_selection
    part = weight[outputs if isinstance(outputs, Tensor) else slice(*outputs)]
    if conv.groups > 1:
        return part
    inputs = conv.in_selection
    return part[:, inputs if isinstance(inputs, Tensor) else slice(*inputs)]


def _torch_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, conv: Conv, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the selected part of the weight, by ATen."""
    top, bottom, left, right = conv.padding
    symmetric = top == bottom and left == right
    padding = (top, left) if symmetric else (0, 0)
    if not symmetric:
        x = F.pad(x, (left, right, top, bottom))
    part = _part(weight, conv)
    groups = 1 if conv.groups == 1 else x.shape[1] // weight.shape[1]
    window = conv.stride, padding, conv.dilation
    grad_x, grad_part, _ = convolution_backward(
        as_channels_last(grad_y), x, part, window, groups, (*wanted, False)
    )
    if wanted[0]:
        height, width = x.shape[2:]
        if not symmetric:
            grad_x = grad_x[:, :, top : height - bottom, left : width - right]
        grad_x = empty_channels_last(grad_x, *grad_x.shape).copy_(grad_x)
    return grad_x, grad_part


def _place(part: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], conv: Conv) -> Tensor:
    """``part`` at its selection in zeros of the full weight's shape."""
    full = part.new_empty_strided(shape, strides).zero_()
    inputs, outputs = conv.in_selection, conv.out_selection
    if conv.groups > 1:
        full[slice(*outputs)] = part
        return full
    rows = full if isinstance(outputs, Tensor) else full[slice(*outputs)]
    if not isinstance(outputs, Tensor) and not isinstance(inputs, Tensor):
        rows[:, slice(*inputs)] = part
    elif not isinstance(outputs, Tensor):
        rows[:, inputs] = part
    elif not isinstance(inputs, Tensor):
        full[outputs, slice(*inputs)] = part
    else:
        full[outputs[:, None], inputs[None, :]] = part
    return full


# --- the others -----------------------------------------------------------------------------------


def _triton() -> ModuleType:
    from pyeff.triton_kernels import nested_conv2d as kernels  # only where it is asked for

    return kernels
