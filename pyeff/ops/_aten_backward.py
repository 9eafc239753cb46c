"""ATen's gradients of a convolution, where they can be trusted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff.ops._conv_args import Pair

Grads = tuple[Tensor, Tensor, Tensor]


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    window: tuple[Pair, Pair, Pair],
    groups: int,
    wanted: Sequence[bool],
) -> Grads:
    """Gradients of input, weight and bias of ``conv2d``.

    On the CPU, in bfloat16, oneDNN leaves a part of the weight's gradient unwritten where a map has
    fewer columns than the stride (seen in torch 2.13): there it is computed in float32.

    Args:
        grad: of the output, ``[N, O, H', W']``.
        x: ``[N, C, H, W]``.
        weight: ``[O, C / groups, kh, kw]``.
        window: stride, padding and dilation, each (vertical, horizontal).
        groups: of the channels.
        wanted: which of the three; the others are undefined tensors, which Python sees as ``None``.
    """
    stride, padding, dilation = window
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[3] < stride[1]:
        wide = convolution_backward(grad.float(), x.float(), weight.float(), window, groups, wanted)
        first, second, third = (t.to(x.dtype) if t is not None else t for t in wide)
        return first, second, third
    biases = [weight.shape[0]] if wanted[2] else None
    grads: Grads = torch.ops.aten.convolution_backward(
        grad, x, weight, biases, stride, padding, dilation, False, (0, 0), groups, list(wanted)
    )
    return grads
