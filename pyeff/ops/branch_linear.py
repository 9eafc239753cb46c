"""Linear layer of every image with the branches that it takes."""

from torch import Tensor

from pyeff.ops._branch_args import check_bias, index_of, require_one_per_route, route_index
from pyeff.ops._branch_conv2d_backends import Call, cpp_call
from pyeff.ops._branch_conv2d_op import run
from pyeff.ops._branch_maps import Conv
from pyeff.ops._eager import is_plain
from pyeff.ops._known_calls import KnownCalls
from pyeff.ops._tensor_args import check_tensor, check_together, require
from pyeff.ops.top_k_routes import Routes

OP = "branch_linear"
_CONV = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)


def branch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes | Tensor,
    *,
    validate: bool = False,
) -> Tensor:
    r"""Multiplies every image's features by the weights of the k branches that it takes.

    .. math:: y_{n,j} = W_{r_{n,j}} x_n + b_{r_{n,j}}

    Runs as a 1x1 convolution of :func:`pyeff.ops.branch_conv2d`.

    Args:
        x: One row for each image, ``[N, I]``, or for each pair, ``[N, k, I]``.
        weight: Weights :math:`W` of all branches, ``[B, O, I]``, dtype and device of ``x``.
        bias: Biases :math:`b`, ``[B, O]``, or None.
        routes: The branches :math:`r`: Routes, or an int32 or int64 index ``[N, k]``.
        validate: Also checks the index's values on a GPU, which synchronises. On the CPU they are
            always checked.

    Returns:
        ``[N, k, O]``, dtype and device of ``x``; aliases nothing.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together or a route names no branch.
        TypeError: If an argument is no tensor, or not of a fitting dtype.

    Twice differentiable; the gradients of branches that no image takes are exactly zero.
    Deterministic.

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
    Inference", CVPR 2018.

    Example:
        >>> index = torch.tensor([[3, 7], [0, 3]])
        >>> branch_linear(torch.randn(2, 64), torch.randn(20, 10, 64), None, index).shape
        torch.Size([2, 2, 10])
    """
    index = index_of(routes)
    plain = is_plain(x, weight, bias) and type(index) is Tensor

    def checked() -> Conv:
        check_tensor(OP, "x", x, {2: "[N, I]", 3: "[N, k, I]"})
        check_tensor(OP, "weight", weight, {3: "[B, O, I]"})
        check_bias(OP, bias, weight.shape[:2])
        check_together(OP, "x", x, weight=weight, bias=bias)
        _check_shapes(x, weight, route_index(OP, routes, x, weight.shape[0], validate=validate))
        return _CONV

    if not plain or validate:
        call = Call(checked(), None)
    else:
        call = _known.get(
            (x, weight, bias, index),
            None,
            lambda: Call(checked(), cpp_call(_maps(x), _maps(weight), index, _CONV)),
        )
    y = run(OP, _maps(x), _maps(weight), bias, index, call, plain=plain, owner=weight)
    return y[..., 0, 0]


def _maps(rows: Tensor) -> Tensor:
    """Rows [..., I] as maps of one pixel."""
    return rows[..., None, None]


_known: KnownCalls[Call] = KnownCalls()


def _check_shapes(x: Tensor, weight: Tensor, index: Tensor) -> None:
    require(OP, weight.shape[0] > 0, lambda: "weight must have at least one branch, got 0")
    require(
        OP,
        weight.shape[1] > 0 and weight.shape[2] > 0,
        lambda: f"weight must have features, got {list(weight.shape)}",
    )
    require(
        OP,
        x.shape[-1] == weight.shape[2],
        lambda: f"x must have the {weight.shape[2]} features of a branch, got {x.shape[-1]}",
    )
    if x.dim() == 3:
        require_one_per_route(OP, "a row", x, index)
