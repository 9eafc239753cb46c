"""Convolution of every image with the branches that it takes."""

from torch import Tensor

from pyeff.ops._branch_args import check_bias, index_of, require_one_per_route, route_index
from pyeff.ops._branch_conv2d_backends import OP, Call, cpp_call
from pyeff.ops._branch_conv2d_op import run
from pyeff.ops._branch_maps import Conv
from pyeff.ops._conv_args import Pair, padding_sides, pair
from pyeff.ops._eager import is_plain
from pyeff.ops._known_calls import KnownCalls
from pyeff.ops._tensor_args import check_tensor, check_together, require
from pyeff.ops.top_k_routes import Routes


def branch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes | Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | str | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    validate: bool = False,
) -> Tensor:
    r"""Convolves every image with the weights of the k branches that it takes.

    .. math:: y_{n,j} = \mathrm{conv2d}(x_n,\; W_{r_{n,j}},\; b_{r_{n,j}})

    No loop over branches or images, no synchronisation; the result's shape does not depend on the
    routes.

    Args:
        x: One map for each image, ``[N, C, H, W]``, or for each pair, ``[N, k, C, H, W]``. Best
            with C innermost in memory (channels_last).
        weight: Weights :math:`W` of all branches, ``[B, O, C / groups, kh, kw]``, dtype and device
            of ``x``.
        bias: Biases :math:`b`, ``[B, O]``, or None.
        routes: The branches :math:`r`: Routes, or an int32 or int64 index ``[N, k]``. A branch may
            stand twice in a row.
        stride: One or two ints.
        padding: One or two ints, "same" (stride 1 only) or "valid", as in torch.nn.Conv2d.
        dilation: One or two ints.
        groups: Of every branch.
        validate: Also checks the index's values on a GPU, which synchronises. On the CPU they are
            always checked.

    Returns:
        ``[N, k, O, H', W']``, O innermost in memory, dtype and device of ``x``; aliases nothing.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together or a route names no branch.
        TypeError: If an argument is no tensor, or not of a fitting dtype.

    Twice differentiable in ``x``, ``weight`` and ``bias``; the gradients of branches that no image
    takes are exactly zero. Deterministic.

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
    Inference", CVPR 2018.

    Example:
        >>> weight = torch.randn(20, 16, 32, 3, 3)  # 20 branches
        >>> index = torch.tensor([[3, 7], [0, 3]])  # two of them for each image
        >>> branch_conv2d(torch.randn(2, 32, 8, 8), weight, None, index, padding=1).shape
        torch.Size([2, 2, 16, 8, 8])
    """
    index = index_of(routes)
    plain = is_plain(x, weight, bias) and type(index) is Tensor

    def checked() -> Conv:
        _check_tensors(x, weight, bias)
        index = route_index(OP, routes, x, weight.shape[0], validate=validate)
        conv = _conv(weight, stride, padding, dilation, groups)
        _check_shapes(x, weight, index, conv)
        return conv

    if not plain or validate:
        call = Call(checked(), None)
    else:
        options = (stride, padding, dilation, groups)
        call = _known.get(
            (x, weight, bias, index),
            options,
            lambda: Call(conv := checked(), cpp_call(x, weight, index, conv)),
        )
    return run(OP, x, weight, bias, index, call, plain=plain)


_known: KnownCalls[Call] = KnownCalls()


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor(OP, "x", x, {4: "[N, C, H, W]", 5: "[N, k, C, H, W]"})
    check_tensor(OP, "weight", weight, {5: "[B, O, C / groups, kh, kw]"})
    check_bias(OP, bias, weight.shape[:2])
    check_together(OP, "x", x, weight=weight, bias=bias)


def _conv(
    weight: Tensor, stride: int | Pair, padding: int | str | Pair, dilation: int | Pair, groups: int
) -> Conv:
    if not isinstance(groups, int) or groups < 1 or weight.shape[1] % groups != 0:
        raise ValueError(
            f"{OP}: groups must be at least 1 and divide the weight's {weight.shape[1]} output "
            f"channels, got {groups!r}"
        )
    stride = pair(OP, "stride", stride, 1)
    dilation = pair(OP, "dilation", dilation, 1)
    sides = padding_sides(OP, padding, (weight.shape[3], weight.shape[4]), stride, dilation)
    return Conv(stride, sides, dilation, groups)


def _check_shapes(x: Tensor, weight: Tensor, index: Tensor, conv: Conv) -> None:
    require(OP, weight.shape[0] > 0, lambda: "weight must have at least one branch, got 0")
    require(
        OP,
        weight.shape[1] > 0 and weight.shape[2] > 0,
        lambda: f"weight must have channels, got {list(weight.shape)}",
    )
    require(
        OP,
        weight.shape[3] > 0 and weight.shape[4] > 0,
        lambda: f"weight must have a kernel of 1x1 or more, got {list(weight.shape)}",
    )
    channels = weight.shape[2] * conv.groups
    require(
        OP,
        x.shape[-3] == channels,
        lambda: f"x must have the {channels} input channels of a branch, got {x.shape[-3]}",
    )
    require(
        OP,
        x.shape[-2] > 0 and x.shape[-1] > 0,
        lambda: f"x must have maps of at least one pixel, got {list(x.shape)}",
    )
    if x.dim() == 5:
        require_one_per_route(OP, "a map", x, index)
    height, width = conv.output_size(x, weight)
    require(
        OP,
        height > 0 and width > 0,
        lambda: (
            f"x must be at least as large as the kernel, got {list(x.shape)} for kernel "
            f"{list(weight.shape[3:])}, padding {conv.padding} and dilation {conv.dilation}"
        ),
    )
