"""branch_conv2d composed of ATen's operators: gathered weights and one grouped convolution."""

import torch.nn.functional as F
from torch import Tensor

from pyeff.ops._aten_backward import convolution_backward
from pyeff.ops._branch_maps import Conv, empty_maps
from pyeff.ops._conv_args import Pair


def compose(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv) -> Tensor:
    """The whole operator; PyTorch can differentiate it in every way."""
    n, k = index.shape
    x, padding = _pad(x, conv)
    if n == 0:  # a convolution has at least one group
        none = x.flatten(0, -4) if x.dim() == 5 else x
        first = None if bias is None else bias[0]
        y = F.conv2d(none, weight[0], first, conv.stride, padding, conv.dilation, conv.groups)
        return y.unsqueeze(1).expand(-1, k, -1, -1, -1)
    chosen = index.reshape(-1).long()
    rows, groups = _as_groups(x, index, conv)
    y = F.conv2d(
        rows,
        weight[chosen].flatten(0, 1),
        None if bias is None else bias[chosen].flatten(),
        conv.stride,
        padding,
        conv.dilation,
        groups,
    )
    return y.reshape(n, k, -1, *y.shape[-2:])


def _as_groups(x: Tensor, index: Tensor, conv: Conv) -> tuple[Tensor, int]:
    """One image whose channel groups are the pairs, or the images where k branches share one."""
    if x.dim() == 4 and conv.groups > 1:
        x = x.unsqueeze(1).expand(-1, index.shape[1], -1, -1, -1)
    pairs = index.shape[0] if x.dim() == 4 else index.numel()
    return x.reshape(1, -1, *x.shape[-2:]), pairs * conv.groups


def _pad(x: Tensor, conv: Conv) -> tuple[Tensor, Pair]:
    """x and what is left for the convolution to pad; it pads both sides alike."""
    top, bottom, left, right = conv.padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv) -> Tensor:
    """y [N, k, O, H', W'], O innermost."""
    y = compose(x, weight, bias, index, conv)
    return empty_maps(y, *y.shape).copy_(y)


def grad_input(
    grad_y: Tensor, weight: Tensor, index: Tensor, shape: tuple[int, ...], conv: Conv
) -> Tensor:
    """Gradient of x of that shape, C innermost."""
    grad_x = empty_maps(grad_y, *shape)
    if index.shape[0] == 0:
        return grad_x
    top, bottom, left, right = conv.padding
    x, _ = _pad(grad_y.new_empty(1).expand(shape), conv)  # only its shape is read
    result = _convolution_backward(grad_y, x, weight, index, conv, (True, False))[0]
    height, width = x.shape[-2:]
    if x.shape[-2:] != grad_x.shape[-2:]:
        result = result[:, :, top : height - bottom, left : width - right]
    if len(shape) == 4 and conv.groups > 1:  # the pairs of an image were groups of their own
        parts = result.reshape(*index.shape, *shape[1:])
        return grad_x.copy_(parts.sum(1))
    return grad_x.copy_(result.reshape(shape))


def grad_weight(
    grad_y: Tensor, x: Tensor, index: Tensor, size: tuple[int, ...], conv: Conv
) -> Tensor:
    """Gradient of weight [B, O, C / groups, kh, kw]."""
    result = grad_y.new_zeros(size)
    if index.shape[0] == 0:
        return result
    weight = grad_y.new_empty(1).expand(size)  # only its shape is read
    parts = _convolution_backward(grad_y, _pad(x, conv)[0], weight, index, conv, (False, True))[1]
    chosen = index.reshape(-1).long()
    return result.index_put_((chosen,), parts.unflatten(0, (-1, size[1])), accumulate=True)


def _convolution_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, index: Tensor, conv: Conv, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the one grouped convolution's own input and weight."""
    rows, groups = _as_groups(x, index, conv)
    kernels = weight[index.reshape(-1).long()].flatten(0, 1)
    padding = _pad(x[:0], conv)[1]
    window = conv.stride, padding, conv.dilation
    grad_rows, grad_kernels, _ = convolution_backward(
        grad_y.reshape(1, -1, *grad_y.shape[-2:]), rows, kernels, window, groups, (*wanted, False)
    )
    return grad_rows, grad_kernels
