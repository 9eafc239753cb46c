"""Sum of the chosen branches' projections."""

from torch import Tensor

from pyeff.ops._branch_args import check_bias, route_index
from pyeff.ops._branch_combine_op import OP, run
from pyeff.ops._eager import is_plain
from pyeff.ops._known_calls import KnownCalls
from pyeff.ops._tensor_args import check_tensor, check_together, require
from pyeff.ops.top_k_routes import Routes


def combine(
    y: Tensor, projection: Tensor, bias: Tensor | None, routes: Routes, *, validate: bool = False
) -> Tensor:
    r"""Adds up the projections of the features that an image's branches gave.

    .. math:: z_n = b + \sum_j w_{n,j}\, P_{r_{n,j}}\, y_{n,j}

    The same as writing every branch's features to their place in one long vector, zeros elsewhere,
    and one linear layer behind it.

    Args:
        y: Features of every pair, ``[N, k, F]``.
        projection: :math:`P` of all branches, ``[B, O, F]``, dtype and device of ``y``.
        bias: :math:`b`, ``[O]``, or None.
        routes: Branches :math:`r` and their weights :math:`w`, which may have another
            floating-point dtype than ``y``.
        validate: Also checks the index's values on a GPU, which synchronises. On the CPU they are
            always checked.

    Returns:
        ``[N, O]``, dtype and device of ``y``; aliases nothing.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together or a route names no branch.
        TypeError: If ``routes`` is not Routes, or an argument is no tensor of a fitting dtype.

    Twice differentiable in ``y``, ``projection``, ``bias`` and ``routes.weight``; the gradients of
    projections that no image takes are exactly zero. Deterministic.

    Source: Mullapudi et al., "HydraNets: Specialized Dynamic Architectures for Efficient
    Inference", CVPR 2018 (the combiner).

    Example:
        >>> routes = Routes(torch.tensor([[3, 7], [0, 3]]), torch.ones(2, 2))
        >>> combine(torch.randn(2, 2, 64), torch.randn(20, 10, 64), None, routes).shape
        torch.Size([2, 10])
    """
    if not isinstance(routes, Routes):
        raise TypeError(f"{OP}: routes must be Routes, got {type(routes).__name__}")
    index, weight = routes
    plain = is_plain(y, projection, bias) and type(index) is Tensor
    plain = plain and is_plain(weight, weight, None)

    def checked() -> bool:
        _check_tensors(y, projection, bias, routes, validate)
        return True

    if not plain or validate:
        checked()
    else:
        _known.get((y, projection, bias, index, weight), None, checked)
    if weight.dtype != y.dtype:
        weight = weight.to(y.dtype)
    return run(y, projection, bias, index, weight, plain=plain)


_known: KnownCalls[bool] = KnownCalls()


def _check_tensors(
    y: Tensor, projection: Tensor, bias: Tensor | None, routes: Routes, validate: bool
) -> None:
    check_tensor(OP, "y", y, {3: "[N, k, F]"})
    check_tensor(OP, "projection", projection, {3: "[B, O, F]"})
    check_bias(OP, bias, projection.shape[1:2])
    check_together(OP, "y", y, projection=projection, bias=bias)
    index = route_index(OP, routes, y, projection.shape[0], validate=validate)
    _check_shapes(y, projection, index, routes.weight)


def _check_shapes(y: Tensor, projection: Tensor, index: Tensor, weight: Tensor) -> None:
    check_tensor(OP, "routes.weight", weight, {2: "[N, k]"})
    if weight.device != y.device:
        raise ValueError(
            f"{OP}: routes.weight must be on the device of y, {y.device}, got {weight.device}"
        )
    require(
        OP,
        weight.shape == index.shape,
        lambda: (
            f"routes.weight must have the shape of routes.index, {list(index.shape)}, "
            f"got {list(weight.shape)}"
        ),
    )
    require(OP, projection.shape[0] > 0, lambda: "projection must have at least one branch, got 0")
    pairs = (*index.shape, projection.shape[2])
    require(
        OP,
        tuple(y.shape) == pairs,
        lambda: f"y must be {list(pairs)}, the features of every pair, got {list(y.shape)}",
    )
