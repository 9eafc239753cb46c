import pytest
import torch

from pyeff.nn import Combiner
from pyeff.ops import Routes

N, K, B, F, OUT = 4, 2, 5, 3, 6
INDEX = torch.tensor([[0, 1], [4, 2], [1, 1], [3, 0]])


def test_is_a_linear_layer_over_all_features_side_by_side():
    combiner = Combiner(F, OUT, B).double()
    y = torch.randn(N, K, F, dtype=torch.float64)
    weight = torch.rand(N, K, dtype=torch.float64)
    wide = torch.zeros(N, B, F, dtype=torch.float64)
    for n in range(N):
        for j in range(K):
            wide[n, INDEX[n, j]] += weight[n, j] * y[n, j]
    joined = combiner.weight.permute(1, 0, 2).reshape(OUT, B * F)
    expected = wide.flatten(1) @ joined.T + combiner.bias
    torch.testing.assert_close(combiner(y, Routes(INDEX, weight)), expected)


def test_gradients_reach_everything():
    combiner = Combiner(F, OUT, B)
    y = torch.randn(N, K, F, requires_grad=True)
    weight = torch.rand(N, K, requires_grad=True)
    combiner(y, Routes(INDEX, weight)).square().sum().backward()
    for t in (y, weight, combiner.weight, combiner.bias):
        assert t.grad.abs().sum() > 0


def test_starts_like_the_linear_layer_that_it_is():
    combiner = Combiner(64, 50, 20)
    bound = 1 / (64 * 20) ** 0.5
    assert combiner.weight.abs().max() <= bound
    assert combiner.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_without_bias_and_errors():
    assert Combiner(F, OUT, B, bias=False).bias is None
    with pytest.raises(ValueError, match="features, classes and n must be positive, got 3, 0 and"):
        Combiner(F, 0, B)
