import math

import pytest
import torch
from torch import nn

from pyeff.nn import TopKGate
from pyeff.nn.top_k_gate import squared_variation

N, F, B = 7, 6, 5


def gate_of(mode, **options):
    gate = TopKGate(F, B, mode, **options).double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return gate


def features(n=N):
    return torch.randn(n, F, dtype=torch.float64)


def test_supervised_keeps_the_best_and_no_task_loss_reaches_it():
    gate, x = gate_of("supervised"), features()
    scores, routes, auxiliary = gate(x, 3)
    assert torch.equal(scores, gate.score(x))
    assert torch.equal(routes.index.long(), scores.topk(3).indices)
    assert torch.equal(routes.weight, torch.ones(N, 3, dtype=torch.float64))
    assert not routes.weight.requires_grad
    assert auxiliary.shape == ()
    assert auxiliary.item() == 0


def test_learn_weights_by_the_kept_scores_with_gradient():
    gate, x = gate_of("learn"), features()
    scores, routes, auxiliary = gate(x, 3)
    kept = scores.topk(3).values
    torch.testing.assert_close(routes.weight, kept.softmax(1))
    (routes.weight * torch.randn_like(kept)).sum().backward()
    assert gate.score.weight.grad.abs().sum() > 0
    assert auxiliary.item() == 0


def test_noisy_gate_starts_with_all_branches_equal():
    gate = TopKGate(F, B, "noisy_topk")
    assert not gate.score.weight.any()
    assert not gate.noise.weight.any()
    assert gate.score.bias is None


def noisy(gate, x):
    """H(x) as the formula has it, with the noise that the gate will draw next."""
    state = torch.get_rng_state()
    clean = x @ gate.score.weight.T
    spread = torch.log1p(torch.exp(x @ gate.noise.weight.T))
    h = clean + torch.randn_like(clean) * spread
    torch.set_rng_state(state)
    return clean, spread, h


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_noisy_gate_by_the_formulas(k):
    gate, x = gate_of("noisy_topk", importance=0.3, load=0.7), features()
    clean, spread, h = noisy(gate, x)
    scores, routes, auxiliary = gate(x, k)
    torch.testing.assert_close(scores, clean)
    assert torch.equal(routes.index.long(), h.topk(k).indices)
    g = torch.full_like(h, -math.inf).scatter(1, h.topk(k).indices, h.topk(k).values).softmax(1)
    torch.testing.assert_close(routes.weight, g.gather(1, routes.index.long()))
    importance = g.sum(0)
    expected = 0.3 * (importance.std(correction=0) / importance.mean()) ** 2
    load = torch.zeros(B, dtype=torch.float64)
    for row in range(N):
        for i in range(B):
            others = sorted((h[row, j].item() for j in range(B) if j != i), reverse=True)
            if k == B:  # no k-th largest of k - 1 others: it runs whatever the noise
                load[i] += 1
                continue
            z = (clean[row, i] - others[k - 1]) / spread[row, i]
            load[i] += 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    expected = expected + 0.7 * (load.std(correction=0) / load.mean()) ** 2
    torch.testing.assert_close(auxiliary, expected)
    auxiliary.backward()
    assert gate.score.weight.grad.isfinite().all()
    assert gate.score.weight.grad.abs().sum() > 0
    if k < B:
        assert gate.noise.weight.grad.abs().sum() > 0


def test_noisy_gate_in_eval_mode_has_no_noise_and_no_loss():
    gate, x = gate_of("noisy_topk").eval(), features()
    _, routes, auxiliary = gate(x, 2)
    assert torch.equal(routes.index.long(), (x @ gate.score.weight.T).topk(2).indices)
    assert auxiliary.item() == 0


def test_noisy_gate_survives_a_spread_that_underflows():
    gate = gate_of("noisy_topk").float()
    nn.init.constant_(gate.noise.weight, -1000.0)
    _, routes, auxiliary = gate(torch.ones(N, F), 2)
    auxiliary.backward()
    assert auxiliary.isfinite()
    assert gate.score.weight.grad.isfinite().all()
    assert routes.weight.isfinite().all()


@pytest.mark.parametrize("mode", ["supervised", "noisy_topk", "learn"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_teacher_forcing_keeps_k_different_branches_with_the_true_group(mode, k):
    gate, x = gate_of(mode), features()
    groups = torch.randint(B, (N,))
    scores, routes, _ = gate(x, k, groups)
    assert torch.equal(routes.index[:, 0].long(), groups)
    for row in routes.index.tolist():
        assert len(set(row)) == k
    if mode == "supervised":
        others = scores.scatter(1, groups[:, None], -math.inf).topk(k - 1).indices
        assert torch.equal(routes.index[:, 1:].long(), others)
    else:
        torch.testing.assert_close(routes.weight.sum(1), torch.ones(N, dtype=torch.float64))
        assert routes.weight.isfinite().all()
        routes.weight[:, 0].sum().backward()
        assert gate.score.weight.grad.isfinite().all()


def test_squared_variation():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert squared_variation(x).item() == pytest.approx((2 / 3) / 4)
    assert squared_variation(torch.zeros(3)).item() == 0


def test_empty_batch():
    for mode in ("supervised", "learn"):
        scores, routes, auxiliary = gate_of(mode)(features(0), 2)
        assert scores.shape == (0, B)
        assert routes.index.shape == (0, 2)
        assert auxiliary.item() == 0
    _, routes, auxiliary = gate_of("noisy_topk")(features(0), 2)
    assert routes.index.shape == (0, 2)
    assert auxiliary.item() == 0


def test_errors():
    gate = gate_of("supervised")
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'best'"):
        TopKGate(F, B, "best")
    with pytest.raises(ValueError, match="features and n must be positive, got 6 and 0"):
        TopKGate(F, 0)
    with pytest.raises(ValueError, match="importance and load must not be negative, got -1 and"):
        TopKGate(F, B, importance=-1)
    for k in (0, B + 1):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.5, got {k}"):
            gate(features(), k)
    with pytest.raises(ValueError, match=r"x must be \[N, 6\], got \[7, 3\]"):
        gate(features()[:, :3], 2)
    with pytest.raises(ValueError, match="hold no NaN"):
        gate(torch.full((N, F), math.nan, dtype=torch.float64), 2)
    for bad in (torch.zeros(N - 1, dtype=torch.int64), torch.zeros(N)):
        with pytest.raises(ValueError, match=r"groups must be int64 \[7\], one for each image"):
            gate(features(), 2, bad)
    for value in (-1, B):
        with pytest.raises(ValueError, match=rf"groups must be in 0\.\.4, got {value}"):
            gate(features(), 2, torch.full((N,), value))
