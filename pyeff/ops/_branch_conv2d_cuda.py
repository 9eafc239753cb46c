"""branch_conv2d on the CUDA kernels.

They take weights with the channels that are summed innermost in memory. A copy of a weight that is
not so is made for every call: one that was kept would be missed by CUDA graphs, whose replay raises
no version.
"""

from torch import Tensor

from pyeff import _C as native
from pyeff.ops._branch_maps import Conv, channels_innermost, empty_maps
from pyeff.ops._conv_args import tf32_allowed
from pyeff.ops._top_k_routes_cuda import launch_plan


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, conv: Conv) -> Tensor:
    """y [N, k, O, H', W'], O innermost."""
    y = empty_maps(x, *index.shape, weight.shape[1], *conv.output_size(x, weight))
    native.branch_conv2d_forward_cuda(
        channels_innermost(x),
        _innermost(weight),
        None if bias is None else bias.contiguous(),
        index,
        y,
        _problem(conv),
    )
    return y


def grad_input(
    grad_y: Tensor, weight: Tensor, index: Tensor, shape: tuple[int, ...], conv: Conv
) -> Tensor:
    """Gradient of x of that shape, [N, C, H, W] or [N, k, C, H, W], C innermost."""
    grad_x = empty_maps(grad_y, *shape)
    native.branch_conv2d_grad_input_cuda(
        channels_innermost(grad_y), _transposed(weight, conv.groups), index, grad_x, _problem(conv)
    )
    return grad_x


def grad_weight(
    grad_y: Tensor, x: Tensor, index: Tensor, size: tuple[int, ...], with_bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [B, O, C / groups, kh, kw] and of bias [B, O] (else [0])."""
    grad = x.new_empty(size)
    grad_bias = x.new_empty(size[:2] if with_bias else 0)
    order, offsets = launch_plan(index, size[0])
    native.branch_conv2d_grad_weight_cuda(
        channels_innermost(grad_y),
        channels_innermost(x),
        index,
        order,
        offsets,
        grad,
        grad_bias if with_bias else None,
        _problem(conv),
    )
    return grad, grad_bias


def _innermost(weight: Tensor) -> Tensor:
    """[B, O, C / groups, kh, kw] as [B, O, kh, kw, C / groups] in memory; a copy where need be."""
    return weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """[B, C, O / groups, kh, kw] of [B, O, C / groups, kh, kw], O / groups innermost in memory."""
    by_group = weight.unflatten(1, (groups, -1))  # [B, groups, O / groups, C / groups, kh, kw]
    turned = by_group.permute(0, 1, 3, 4, 5, 2).contiguous()
    return turned.flatten(1, 2).permute(0, 1, 4, 2, 3)


def _problem(conv: Conv) -> tuple[int, ...]:
    top, _, left, _ = conv.padding
    return (*conv.stride, top, left, *conv.dilation, conv.groups, 1, int(tf32_allowed()))
