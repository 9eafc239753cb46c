import pytest
import torch
from numerics import assert_close
from torch import nn

from pyeff.nn import BranchBatchNorm2d
from pyeff.ops import Routes

C, B = 4, 5
INDEX = torch.tensor([[0, 1], [1, 3], [0, 3], [1, 0]])  # 2 and 4 are chosen by nobody


def norm_of(dtype=torch.float64, **options):
    norm = BranchBatchNorm2d(C, B, **options).to(dtype)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norm.track_running_stats:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def plain_of(norm, branch):
    plain = nn.BatchNorm2d(C, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain = plain.to(torch.float64)
    plain.load_state_dict({key: value[branch] for key, value in norm.state_dict().items()})
    return plain.train(norm.training)


def pairs_of(branch):
    return (branch == INDEX).nonzero(as_tuple=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_every_branch_is_a_batch_norm_over_its_images(options, training):
    norm = norm_of(**options).train(training)
    plains = [plain_of(norm, branch) for branch in range(B)]
    for _ in range(2):
        x = torch.randn(4, 2, C, 3, 3, dtype=torch.float64)
        y = norm(x, INDEX)
        for branch in (0, 1, 3):
            rows = pairs_of(branch)
            assert_close(y[rows].detach(), plains[branch](x[rows]).detach(), f"branch {branch}")
    for key, value in norm.state_dict().items():
        for branch in range(B):
            there = plains[branch].state_dict()[key]
            assert_close(value[branch].double(), there.double(), f"{key} of {branch}")


def test_shared_maps_are_those_of_every_branch():
    norm = norm_of()
    twin = norm_of()
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(4, C, 3, 3, dtype=torch.float64)
    repeated = x.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    assert_close(norm(x, INDEX).detach(), twin(repeated, INDEX).detach(), "shared")


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_derivatives(options, side):
    # At one position the branches 2 and 4 have one value each: those are the safe rows.
    index = torch.tensor([[0, 1], [0, 1], [2, 4]])
    norm = norm_of(**options)
    state = {key: value.clone() for key, value in norm.state_dict().items()}

    def run(x, weight, bias):
        with torch.no_grad():
            for key, buffer in norm.named_buffers():
                buffer.copy_(state[key])
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, index))

    x = torch.randn(3, 2, C, side, side, dtype=torch.float64, requires_grad=True)
    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_single_value_is_normalised_by_the_running_statistics_and_changes_nothing():
    norm = norm_of()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(2, 1, C, 1, 1, dtype=torch.float64)
    index = torch.tensor([[3], [1]])
    y = norm(x, index)
    assert_close(y.detach(), norm.eval()(x, index).detach(), "single values")
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_single_value_without_running_statistics_gives_the_bias():
    norm = norm_of(track_running_stats=False)
    y = norm(torch.randn(1, 1, C, 1, 1, dtype=torch.float64), torch.tensor([[3]]))
    assert_close(y[0, 0, :, 0, 0].detach(), norm.bias[3].detach(), "single value")


def test_empty_batch():
    norm = norm_of()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(0, 2, C, 3, 3, dtype=torch.float64, requires_grad=True)
    y = norm(x, torch.empty(0, 2, dtype=torch.int64))
    assert y.shape == x.shape
    y.sum().backward()
    assert not norm.weight.grad.any()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_large_means_do_not_spoil_the_variance():
    norm = BranchBatchNorm2d(C, B)
    x = torch.randn(4, 2, C, 6, 6) + 100
    y = norm(x, INDEX)
    expected = norm_of(affine=False)(x.double(), INDEX)
    assert (y - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_with_float32_statistics(dtype):
    norm = norm_of(torch.float32)
    twin = norm_of()
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(4, 2, C, 3, 3).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = norm(x, INDEX), twin(wide, INDEX)
    assert y.dtype == dtype
    assert_close(y.detach(), expected.detach(), "y")
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, wide.grad, "gradient for x")
    assert_close(norm.running_var, twin.running_var.float().double(), "running_var", scale=10)


def test_is_deterministic_and_takes_routes():
    norm = norm_of(torch.float32)
    x = torch.randn(4, 2, C, 9, 9)
    first = norm(x, Routes(INDEX.int(), torch.ones(4, 2)))
    assert torch.equal(first, norm(x, INDEX))


def test_errors():
    norm = norm_of()
    x = torch.randn(4, 2, C, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="channels and branches must be positive, got 0 and 5"):
        BranchBatchNorm2d(0, 5)
    with pytest.raises(ValueError, match=r"x must be \[N, 4, H, W\] or \[N, k, 4, H, W\]"):
        norm(x[:, :, :3], INDEX)
    with pytest.raises(ValueError, match=r"routes.index must be \[4, k\] for 4 images"):
        norm(x, INDEX[:3])
    with pytest.raises(ValueError, match=r"routes.index must have the k of x, 2, got 1"):
        norm(x, INDEX[:, :1])
    with pytest.raises(ValueError, match="must name branches 0 to 4, got 5"):
        norm(x, torch.full((4, 2), 5))
