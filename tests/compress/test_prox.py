"""Proximal operators against numerical minimisation in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pyeff.compress import (
    shrink_groups,
    shrink_groups_in_metric,
    shrink_singular_values,
    soft_threshold,
)
from pyeff.compress.prox import shrink_spectrum, singular_values


def numerical_prox(z, metric, tau, l1):
    """Minimises over x = p - n with p, n >= 0, where the l1 norm is linear."""
    size = len(z)

    def value(both):
        x = both[:size] - both[size:]
        norm = np.linalg.norm(x)
        f = 0.5 * (metric * (x - z) ** 2).sum() + tau * norm + l1 * both.sum()
        smooth = metric * (x - z) + (tau * x / norm if norm > 0 else 0)
        return f, np.concatenate([smooth + l1, -smooth + l1])

    start = np.concatenate([np.maximum(z, 0), np.maximum(-z, 0)]) + 0.01
    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-12}
    bounds = [(0, None)] * (2 * size)
    found = minimize(value, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return found.x[:size] - found.x[size:], found.fun


def objective(x, z, metric, tau, l1):
    return 0.5 * (metric * (x - z) ** 2).sum() + tau * np.linalg.norm(x) + l1 * np.abs(x).sum()


@pytest.mark.parametrize("l1", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])  # of the metric, in powers of ten
@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0, 50.0])
def test_the_group_step_is_the_minimiser(l1, spread, tau):
    z = torch.randn(8, 6, dtype=torch.float64)
    metric = 10 ** (spread * (torch.rand(8, 6, dtype=torch.float64) - 0.5))
    ours = shrink_groups_in_metric(z, metric, tau, l1=l1)
    for x, point, weights in zip(ours.numpy(), z.numpy(), metric.numpy(), strict=True):
        theirs, least = numerical_prox(point, weights, tau, l1)
        assert objective(x, point, weights, tau, l1) <= least + 1e-10
        np.testing.assert_allclose(x, theirs, atol=2e-4)


@pytest.mark.parametrize("l1", [0.0, 0.4])
def test_a_metric_of_ones_is_the_plain_step(l1):
    z, ones = torch.randn(20, 9, dtype=torch.float64), torch.ones(20, 9, dtype=torch.float64)
    tau = torch.rand(20, dtype=torch.float64) * 4
    expected = shrink_groups(z, tau, l1=l1)
    assert 0 < int(expected.eq(0).all(1).sum()) < 20
    torch.testing.assert_close(
        shrink_groups_in_metric(z, ones, tau, l1=l1), expected, rtol=1e-13, atol=1e-13
    )


def test_a_metric_that_spans_adams_range_is_solved_to_rounding():
    z = torch.randn(50, 40, dtype=torch.float64)
    metric = 10 ** (-8 * torch.rand(50, 40, dtype=torch.float64))
    tau = 0.3 * (metric * z).norm(dim=1)
    x = shrink_groups_in_metric(z, metric, tau)
    # Stationary: d (x - z) + tau x / |x| = 0.
    slope = metric * (x - z) + tau[:, None] * x / x.norm(dim=1, keepdim=True)
    assert float((slope.norm(dim=1) / tau).max()) < 1e-10


def test_soft_threshold_is_exact_and_a_tensor_of_thresholds_broadcasts():
    z = torch.tensor([[3.0, -0.5, 0.5], [-2.0, 1.0, 0.0]])
    assert soft_threshold(z, 0.5).tolist() == [[2.5, 0, 0], [-1.5, 0.5, 0]]
    assert soft_threshold(z, torch.tensor([[0.0], [9.0]])).tolist() == [[3, -0.5, 0.5], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups_die_exactly_in_every_dtype(dtype):
    z = torch.randn(16, 5).to(dtype)
    out = shrink_groups(z, z.float().norm(dim=1).median().item())
    assert out.dtype == dtype
    assert 0 < int(out.eq(0).all(1).sum()) < 16
    zero = shrink_groups(torch.zeros(2, 3, dtype=dtype), 0.0)
    assert zero.eq(0).all()


def numerical_nuclear_prox(matrix, tau):
    """Minimises |A B - M|^2 / 2 + tau (|A|^2 + |B|^2) / 2, whose minimum is the same."""
    rows, columns = matrix.shape
    inner = min(rows, columns)
    cut = rows * inner

    def value(flat):
        a, b = flat[:cut].reshape(rows, inner), flat[cut:].reshape(inner, columns)
        rest = a @ b - matrix
        f = 0.5 * (rest**2).sum() + 0.5 * tau * (flat**2).sum()
        return f, np.concatenate([(rest @ b.T + tau * a).ravel(), (a.T @ rest + tau * b).ravel()])

    start = np.random.default_rng(0).standard_normal(cut + inner * columns)
    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-12}
    flat = minimize(value, start, jac=True, method="L-BFGS-B", options=options).x
    return flat[:cut].reshape(rows, inner) @ flat[cut:].reshape(inner, columns)


@pytest.mark.parametrize("route", ["svd", "gram"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_the_nuclear_step_is_the_minimiser(route, shape):
    matrix = torch.randn(*shape, dtype=torch.float64)
    tau = float(torch.linalg.svdvals(matrix)[2])
    ours = shrink_singular_values(matrix, 0.9 * tau, route=route)
    theirs = numerical_nuclear_prox(matrix.numpy(), 0.9 * tau)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
    assert torch.linalg.matrix_rank(ours, rtol=1e-7) == 3


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_gram_route_is_safe_where_squares_leave_float32(shape):
    # Singular values from 1 to 1e-6: their squares span 12 digits, of which float32 has 7.
    small = min(shape)
    values = torch.logspace(0, -6, small, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(shape[0], small, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], small, dtype=torch.float64)).Q
    exact = (left * values) @ right.T
    expected = (left * (values - 2e-5).clamp_min(0)) @ right.T
    shrunk, kept = shrink_spectrum(exact.float(), 2e-5, route="gram")
    assert shrunk.dtype == torch.float32
    torch.testing.assert_close(shrunk.double(), expected, rtol=0, atol=3e-7)
    assert int((kept > 0).sum()) == int((values > 2e-5).sum())
    torch.testing.assert_close(kept, (values - 2e-5).clamp_min(0), rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_both_routes_agree_and_nothing_is_changed_by_zero(dtype):
    matrix = torch.randn(12, 30).to(dtype)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-7}[dtype]
    for route in ("svd", "gram", "auto"):
        same = shrink_singular_values(matrix, 0.0, route=route)
        torch.testing.assert_close(same, matrix, rtol=tolerance, atol=tolerance)
        values = singular_values(matrix, route=route).double()
        expected = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    one, other = (shrink_singular_values(matrix, 3.0, route=r) for r in ("svd", "gram"))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_zeros_stay_zeros():
    assert shrink_singular_values(torch.zeros(3, 5), 0.0, route="gram").eq(0).all()
    assert shrink_singular_values(torch.randn(3, 5), 1e6, route="svd").eq(0).all()
    rows = torch.randn(6, 9)
    rows[[1, 4]] = 0
    for route in ("svd", "gram"):
        assert shrink_singular_values(rows, 0.5, route=route)[[1, 4]].abs().max() < 1e-6


Z = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_threshold(Z, -1.0), "soft_threshold: tau must not be negative, got -1"),
        (lambda: shrink_groups(Z[0], 1.0), "shrink_groups: z must have 2 dimensions, got"),
        (lambda: shrink_groups(Z, -1.0), "shrink_groups: tau must not be negative, got -1"),
        (lambda: shrink_groups(Z, 1.0, l1=-2.0), "shrink_groups: l1 must not be negative"),
        (lambda: shrink_groups(Z, float("nan")), "tau must not be negative, got nan"),
        (lambda: shrink_groups(Z, torch.ones(2)), "tau must be a number or one for each of 3"),
        (lambda: shrink_groups_in_metric(Z, Z[:2], 1.0), r"metric must be \[3, 4\], got \[2, 4\]"),
        (lambda: shrink_groups_in_metric(Z, Z * -0.0, 1.0), "metric must be positive, got 0$"),
        (lambda: shrink_singular_values(Z[0], 1.0), "matrix must have 2 dimensions"),
        (lambda: shrink_singular_values(Z, -1.0), "tau must not be negative"),
        (lambda: shrink_singular_values(Z, 1.0, route="qr"), "route must be one of 'auto', 'svd'"),
        (lambda: singular_values(Z[0]), "singular_values: matrix must have 2 dimensions"),
        (lambda: singular_values(Z, route="qr"), "singular_values: route must be one of"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
