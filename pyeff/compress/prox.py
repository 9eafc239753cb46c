"""Proximal operators: what a penalty does to parameters in one exact step."""

import torch
from torch import Tensor

ROUTES = ("auto", "svd", "gram")

_ITERATIONS = 200


def soft_threshold(z: Tensor, tau: Tensor | float) -> Tensor:
    """``sign(z) * max(|z| - tau, 0)``: the proximal operator of ``tau * |x|_1``.

    Args:
        z: any shape.
        tau: not negative; a number, or a tensor that broadcasts with ``z``.

    Raises:
        ValueError: a negative threshold.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5]), 1.0)
        tensor([2., 0.])
    """
    limit = _threshold("soft_threshold", "tau", tau, z)
    return z - torch.minimum(torch.maximum(z, -limit), limit)


def shrink_groups(z: Tensor, tau: Tensor | float, *, l1: Tensor | float = 0.0) -> Tensor:
    """Shortens every row by ``tau``, to zero where it is no longer: sparse group lasso's step.

    The minimiser over x of ``|x - z|^2 / 2 + tau |x|_2 + l1 |x|_1`` for each row:
    ``max(1 - tau / |u|, 0) u`` with ``u = soft_threshold(z, l1)``.

    Args:
        z: ``[G, P]``, a group in each row.
        tau: not negative; a number, or one for each group: ``[G]``.
        l1: the same, for the l1 term; 0 is the plain group lasso.

    Returns:
        ``[G, P]`` in ``z``'s dtype; rows of exact zeros where a group is gone.

    Raises:
        ValueError: not two dimensions, a negative threshold, thresholds of another number.

    Source: Alvarez, Salzmann, "Learning the Number of Neurons in Deep Networks", NIPS 2016;
    Simon et al., "A Sparse-Group Lasso", JCGS 2013.

    Example:
        >>> shrink_groups(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    name = "shrink_groups"
    wide = _rows(name, "z", z).to(torch.promote_types(z.dtype, torch.float32))
    u = soft_threshold(wide, _per_group(name, "l1", l1, wide)[:, None])
    norm = u.norm(dim=1)
    limit = _per_group(name, "tau", tau, wide)
    alive = norm > limit
    scale = torch.where(alive, 1 - limit / norm.where(alive, norm.new_ones(())), 0)
    return (u * scale[:, None]).to(z.dtype)


def shrink_groups_in_metric(
    z: Tensor, metric: Tensor, tau: Tensor | float, *, l1: Tensor | float = 0.0
) -> Tensor:
    """:func:`shrink_groups` where distance is measured as the optimiser measures it.

    The minimiser over x of ``sum_j d_j (x_j - z_j)^2 / 2 + tau |x|_2 + l1 |x|_1`` for each row.
    With ``b = soft_threshold(d z, l1)`` it is zero where ``|b| <= tau``, else
    ``x = b v / (d v + tau)`` with the one v > 0 at which ``|b / (d v + tau)| = 1``. Newton's method
    on the inverse of that norm, which is concave, comes up to v from below without ever passing it.

    Args:
        z: ``[G, P]``, a group in each row.
        metric: d, ``[G, P]``, positive; Adam's is ``sqrt(v) + eps``, and its learning rate belongs
            into ``tau`` and ``l1``.
        tau, l1: as in :func:`shrink_groups`.

    Returns:
        ``[G, P]`` in ``z``'s dtype, computed in float64; rows of exact zeros where a group is gone.

    Raises:
        ValueError: as there; a metric of another shape, or not positive.
    """
    name = "shrink_groups_in_metric"
    wide = _rows(name, "z", z).double()
    if metric.shape != z.shape:
        raise ValueError(f"{name}: metric must be {list(z.shape)}, got {list(metric.shape)}")
    d = metric.double()
    if not bool((d > 0).all()):
        least = float(d.min()) + 0.0  # + 0.0: which sign a zero has differs between processors
        raise ValueError(f"{name}: metric must be positive, got {least:g}")
    b = soft_threshold(d * wide, _per_group(name, "l1", l1, wide)[:, None])
    limit = _per_group(name, "tau", tau, wide)
    alive = b.norm(dim=1) > limit
    if not bool(alive.any()):
        return torch.zeros_like(z)
    b, d, limit = b[alive], d[alive], limit[alive, None]
    length = _length_in_metric(b, d, limit)
    out = torch.zeros_like(wide)
    out[alive] = b * length / (d * length + limit)
    return out.to(z.dtype)


def _length_in_metric(b: Tensor, d: Tensor, tau: Tensor) -> Tensor:
    """The v at which ``|b / (d v + tau)| = 1``, ``[G, 1]``; there is one."""
    v = (b.norm(dim=1, keepdim=True) - tau) / d.amax(1, keepdim=True)
    for _ in range(_ITERATIONS):
        below = d * v + tau
        ratio = (b / below).square()
        total = ratio.sum(1, keepdim=True)
        # h = total^(-1/2), h' = total^(-3/2) sum(ratio d / below); the step is (1 - h) / h'.
        step = (total.sqrt() - 1) * total / (ratio * d / below).sum(1, keepdim=True)
        v = v + step.clamp_min(0)
        if bool((step <= 1e-15 * v).all()):
            break
    return v


def shrink_singular_values(matrix: Tensor, tau: float, *, route: str = "auto") -> Tensor:
    """Lowers every singular value by ``tau``, to zero where it is smaller: lower rank.

    The minimiser over X of ``|X - M|^2 / 2 + tau |X|_*`` (Frobenius' and the nuclear norm).

    Args:
        matrix: M, ``[F, K]``.
        tau: not negative.
        route: ``"svd"``: a singular value decomposition; ``"gram"``: eigenvectors of the smaller of
            M M^T and M^T M, in float64 whatever M's dtype, since squaring halves the digits: good
            to 1e-8 of the largest singular value; ``"auto"``: the one that was measured to be
            faster for the shape on a CPU, for float64 the decomposition.

    Returns:
        ``[F, K]`` in M's dtype.

    Raises:
        ValueError: not two dimensions, a negative threshold, an unknown route.

    Source: Alvarez, Salzmann, "Compression-aware Training of Deep Networks", NIPS 2017; Cai,
    Candès, Shen, "A Singular Value Thresholding Algorithm", SIAM J. Optim. 2010.

    Example:
        >>> shrink_singular_values(torch.diag(torch.tensor([3.0, 1.0])), 2.0)
        tensor([[1., 0.],
                [0., 0.]])
    """
    return shrink_spectrum(matrix, tau, route=route)[0]


def shrink_spectrum(
    matrix: Tensor, tau: float, *, route: str = "auto", floor: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`shrink_singular_values`, and the singular values that are left.

    Args:
        matrix, tau, route: as there.
        floor: so many of the largest singular values are kept as they are where they would vanish.

    Returns:
        ``[F, K]`` in M's dtype; ``[min(F, K)]``, falling, float32 at least.

    Raises:
        ValueError: as there.
    """
    name = "shrink_singular_values"
    _rows(name, "matrix", matrix)
    limit = _threshold(name, "tau", tau, matrix)
    if route not in ROUTES:
        allowed = ", ".join(map(repr, ROUTES))
        raise ValueError(f"{name}: route must be one of {allowed}, got {route!r}")
    if route == "auto":
        route = "gram" if _gram_is_faster(matrix) else "svd"
    if route == "gram":
        return _shrunk_by_gram(matrix, limit.double(), floor)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    values = _lowered(values, limit.to(values.dtype), floor)
    kept = int((values > 0).sum())
    shrunk = (left[:, :kept] * values[:kept]) @ right[:kept]
    return shrunk.to(matrix.dtype), values


def _lowered(values: Tensor, tau: Tensor, floor: int) -> Tensor:
    """Falling singular values after the step; the first ``floor`` do not vanish by it."""
    lowered = (values - tau).clamp_min(0)
    lowered[:floor] = torch.where(lowered[:floor] > 0, lowered[:floor], values[:floor])
    return lowered


def singular_values(matrix: Tensor, *, route: str = "auto") -> Tensor:
    """The singular values of ``[F, K]``, falling: ``[min(F, K)]``, float32 at least.

    Args:
        matrix, route: as in :func:`shrink_singular_values`.

    Raises:
        ValueError: not two dimensions, an unknown route.
    """
    name = "singular_values"
    _rows(name, "matrix", matrix)
    if route not in ROUTES:
        allowed = ", ".join(map(repr, ROUTES))
        raise ValueError(f"{name}: route must be one of {allowed}, got {route!r}")
    if route == "gram" or (route == "auto" and _gram_is_faster(matrix)):
        return torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp_min(0).sqrt()
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))


def _shrunk_by_gram(matrix: Tensor, tau: Tensor, floor: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_gram(matrix))
    values, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    lowered = _lowered(values, tau, floor)
    kept = int((lowered > 0).sum())
    scaled = vectors[:, :kept] * (lowered[:kept] / values[:kept])
    wide = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        shrunk = scaled @ (vectors[:, :kept].T @ wide)
    else:
        shrunk = (wide @ vectors[:, :kept]) @ scaled.T
    return shrunk.to(matrix.dtype), lowered


def _gram(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return wide @ wide.T if matrix.shape[0] <= matrix.shape[1] else wide.T @ wide


def _gram_is_faster(matrix: Tensor) -> bool:
    # On one Zen 4 core 1.2 to 2.3 times as fast for long matrices from [10, 640] to [768, 2304],
    # 0.7 to 1.0 times for square ones and [2048, 512]. Not measured on a GPU.
    small, large = sorted(matrix.shape)
    return matrix.dtype != torch.float64 and small >= 10 and large >= 3 * small


def _rows(name: str, argument: str, z: Tensor) -> Tensor:
    if z.dim() != 2:
        raise ValueError(f"{name}: {argument} must have 2 dimensions, got {list(z.shape)}")
    return z


def _threshold(name: str, argument: str, value: Tensor | float, like: Tensor) -> Tensor:
    limit = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if not bool((limit >= 0).all()):
        raise ValueError(f"{name}: {argument} must not be negative, got {float(limit.min())}")
    return limit


def _per_group(name: str, argument: str, value: Tensor | float, z: Tensor) -> Tensor:
    """``[G]``."""
    limit = _threshold(name, argument, value, z)
    if limit.dim() > 1 or (limit.dim() == 1 and limit.shape[0] != z.shape[0]):
        raise ValueError(
            f"{name}: {argument} must be a number or one for each of {z.shape[0]} groups, got "
            f"{list(limit.shape)}"
        )
    return limit.expand(z.shape[0])
