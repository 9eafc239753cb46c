import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms
from torch import nn

from pyeff.nn import (
    Branches,
    Downsampler,
    FactorizedConv2d,
    NonBottleneck1d,
    synchronise_batch_norm,
)
from pyeff.ops import Routes
from pyeff.ops.factorized_conv2d import factorized_conv2d

C, OUT, RANK = 3, 5, 4


def layer(norm=None, kernel=3, train=False, **options):
    """A float64 layer whose every number differs from its neutral value."""
    conv = FactorizedConv2d(C, OUT, kernel, rank=RANK, norm=norm, **options).double()
    return randomise_norms(conv).train(train)


def members(conv, x, residual=None, outer=None):
    """The layer as its members and norms compute it, one by one."""
    y = conv.first(x)
    if conv.norm_inner is not None:
        y = conv.norm_inner(y)
    if conv.inner is not None:
        y = getattr(F, conv.inner)(y)
    y = conv.second(y)
    if conv.norm_outer is not None:
        y = conv.norm_outer(y)
    if residual is not None:
        y = y + residual
    return y if outer is None else getattr(F, outer)(y)


def images(size=(7, 9)):
    return torch.randn(2, C, *size, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


NORMS = [None, "inner", "outer", "both"]


@pytest.mark.parametrize("order", ["vertical_first", "horizontal_first"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("train", [False, True])
def test_equals_its_members(order, norm, train):
    conv = layer(norm, padding=1, order=order, train=train)
    x = images().requires_grad_()
    residual = torch.randn(2, OUT, 7, 9, dtype=torch.float64, requires_grad=True)
    twin, x2, residual2 = copy.deepcopy((conv, x, residual))
    y, expected = conv(x, residual, "relu"), members(twin, x2, residual2, "relu")
    assert_same(y, expected)
    weight = torch.randn_like(expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same(x.grad, x2.grad)
    assert_same(residual.grad, residual2.grad)
    for (name, ours), theirs in zip(conv.named_parameters(), twin.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(conv.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
def test_single_taps_with_padding_are_the_same_in_either_order(norm, stride):
    """Where the zeros around the middle map meet the inner norm and activation."""
    options = {"kernel": 1, "padding": 2, "stride": stride, "inner": "silu"}
    conv = layer(norm, order="horizontal_first", **options)
    x = images()
    expected = members(conv, x)
    assert_same(conv(x), expected)
    with torch.no_grad():
        assert_same(conv(x), expected)
    twin = layer(norm, order="vertical_first", **options)
    twin.load_state_dict(conv.state_dict())
    assert_same(twin(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "stride": 2, "padding": 1},
        {"kernel": 5, "padding": "same", "dilation": 2},
        {"kernel": 3, "padding": "same", "stride": 2},
        {"kernel": 3, "padding": "valid"},
        {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (2, 2)},
        {"kernel": 1, "stride": 2},
        {"kernel": 7, "padding": 3, "inner": "silu"},
        {"kernel": 3, "padding": 1, "inner": None},
        {"kernel": 3, "padding": 1, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["vertical_first", "horizontal_first"])
def test_takes_the_arguments_of_a_convolution(options, order):
    conv = layer("both", order=order, **options)
    x = images()
    with torch.no_grad():
        y = conv(x)
        assert_same(y, members(conv, x))
    # nn.Conv2d has no "same" with a stride: it is half the kernel on every side.
    same = options.get("padding") == "same"
    plain = nn.Conv2d(
        C,
        OUT,
        options["kernel"],
        options.get("stride", 1),
        options.get("dilation", 1) * (options["kernel"] // 2)
        if same
        else options.get("padding", 0),
        options.get("dilation", 1),
    )
    assert y.shape == plain.double()(x).shape
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        ("inner", "norm_inner"),
        ("outer", "norm_outer"),
        ("both", "norm_inner"),
        ("both", "norm_outer"),
    ],
)
def test_one_norm_in_training_and_the_other_not(norm, name):
    conv = layer(norm)
    chosen = getattr(conv, name)
    chosen.train()
    x, twin = images((5, 5)), copy.deepcopy(conv)
    for _ in range(2):
        assert_same(conv(x), members(twin, x))
    chosen.eval()
    twin.eval()
    with torch.no_grad():
        assert_same(conv(x), members(twin, x))


@pytest.mark.parametrize("norm", NORMS)
def test_is_one_call_in_inference(norm, monkeypatch):
    conv, x = layer(norm, padding=1), images()
    residual = torch.randn(2, OUT, 7, 9, dtype=torch.float64)
    expected = members(conv, x, residual, "relu").detach()
    calls = []
    operator = factorized_conv2d

    def counted(*args, **options):
        calls.append(options["residual"] is residual and options["outer"] == "relu")
        return operator(*args, **options)

    monkeypatch.setattr("pyeff.nn.factorized_conv2d.factorized_conv2d", counted)
    for part in conv.children():
        part.register_forward_pre_hook(lambda part, _: pytest.fail(f"{part} ran by itself"))
    with torch.no_grad():
        assert_same(conv(x, residual, "relu"), expected)
    assert calls == [True]


@pytest.mark.parametrize("norm", ["inner", "outer", "both"])
def test_folded_numbers_are_never_stale(norm):
    conv, x = layer(norm, padding=1), images()

    def check():
        with torch.no_grad():
            for _ in range(2):
                assert_same(conv(x), members(conv, x))

    check()
    held = conv._held._held
    check()
    assert conv._held._held is held, "it is computed once"
    for tensor in [*conv.parameters(), *(b for b in conv.buffers() if b.is_floating_point())]:
        with torch.no_grad():
            tensor.mul_(1.5)
        check()
    conv.load_state_dict(layer(norm, padding=1).state_dict())
    check()
    conv.load_state_dict(layer(norm, padding=1).state_dict(), assign=True)
    check()
    conv.train()(x)
    conv.eval()
    check()
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, fused=True)
    conv(x).square().sum().backward()
    optimizer.step()
    check()
    # The memory that a rounding to float32 freed is often given out again at once.
    for _ in range(3):
        conv.float().double()
        check()
    conv.first = nn.Conv2d(C, RANK, (3, 1), padding=(1, 0)).double()
    check()
    twin = pickle.loads(pickle.dumps(conv))
    with torch.no_grad():
        conv.second.weight.zero_()
        assert_same(twin(x), members(twin, x))


def test_numbers_folded_without_gradient_serve_none_with_gradient():
    conv = layer("both", padding=1).requires_grad_(False)
    x = images()
    with torch.inference_mode():
        conv(x)
    x = x.requires_grad_()
    conv(x).square().sum().backward()
    expected = x.grad
    x.grad = None
    members(conv, x).square().sum().backward()
    assert_same(expected, x.grad)


def test_parameters_of_an_inference_mode():
    with torch.inference_mode():
        conv = layer("both", padding=1)
        x = images()
        assert_same(conv(x), members(conv, x))
        conv.second.weight.mul_(2)
        conv.norm_outer.running_mean.add_(1)
        assert_same(conv(x), members(conv, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    conv = layer("both", padding=1).to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        y = conv(x, outer="relu")
        expected = members(copy.deepcopy(conv).double(), x.double(), outer="relu")
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("inner", [None, "relu"])
def test_parameter_count(inner):
    n = 5
    conv = FactorizedConv2d(C, OUT, n, rank=RANK, inner=inner)
    bias = RANK * (inner is not None)
    expected = n * C * RANK + bias + n * RANK * OUT + OUT
    assert sum(p.numel() for p in conv.parameters()) == expected
    assert FactorizedConv2d(C, OUT, n).rank == OUT


def test_starts_as_its_members_would():
    torch.manual_seed(3)
    conv = FactorizedConv2d(C, OUT, 3, padding=1, order="horizontal_first")
    torch.manual_seed(3)
    first = nn.Conv2d(C, OUT, (1, 3), padding=(0, 1))
    second = nn.Conv2d(OUT, OUT, (3, 1), padding=(1, 0))
    assert torch.equal(conv.first.weight, first.weight)
    assert torch.equal(conv.second.bias, second.bias)
    assert list(conv.state_dict()) == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 4, 2), {}, "kernel_size must be odd, got 2"),
        ((3, 4, 0), {}, "kernel_size must be at least 1, got 0"),
        ((3, 4, (3, 1)), {}, r"kernel_size must be one int for both axes, got \(3, 1\)"),
        ((3, 4, 3, (1, 2)), {}, r"stride must be one int for both axes, got \(1, 2\)"),
        ((3, 4, 3, 0), {}, "stride must be at least 1, got 0"),
        ((3, 4, 3, 1, -1), {}, "padding must be at least 0, got -1"),
        ((3, 4, 3, 1, "full"), {}, 'padding must be an int, "same" or "valid", got \'full\''),
        ((3, 4, 3, 1, 0, 0), {}, "dilation must be at least 1, got 0"),
        ((4, 4, 3, 1, 0, 1, 2), {}, "groups must be 1, got 2"),
        ((4, 4, 3), {"padding_mode": "circular"}, "padding_mode must be 'zeros', got 'circular'"),
        ((0, 4, 3), {}, "in_channels and out_channels must be positive, got 0 and 4"),
        ((3, 4, 3), {"rank": 0}, "rank must be positive, got 0"),
        (
            (3, 4, 3),
            {"order": "first"},
            "order must be one of 'vertical_first', 'horizontal_first'",
        ),
        ((3, 4, 3), {"inner": "gelu"}, "inner must be one of None, 'relu', .*, got 'gelu'"),
        ((3, 4, 3), {"norm": "batch"}, "norm must be one of None, 'inner', .*, got 'batch'"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=f"FactorizedConv2d: {message}"):
        FactorizedConv2d(*arguments, **options)


@pytest.mark.parametrize("train", [False, True])
def test_outer_is_checked_in_every_mode(train):
    with pytest.raises(ValueError, match="FactorizedConv2d: outer must be one of None, 'relu'"):
        layer("outer", train=train)(images(), outer="gelu")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("train", [False, True])
def test_compiles_whole(norm, train):
    conv = layer(norm, padding=1, train=train)
    twin, x = copy.deepcopy(conv), images()
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, outer="relu"), twin(x, outer="relu"))
    if not train:
        with torch.no_grad():
            conv.second.weight.mul_(2)
            assert_same(compiled(x), members(conv, x))
    torch._dynamo.reset()


def test_tracers_see_the_members():
    """What is built of pairs can be branched like what is built of plain layers."""
    template = nn.Sequential(
        Downsampler(C, OUT),
        NonBottleneck1d(OUT, dilation=2),
        FactorizedConv2d(OUT, OUT, 3, padding=1, norm="both"),
    )
    branches = Branches(template, 3, init=randomise_norms).double().eval()
    x, index = images((8, 6)), torch.tensor([[2, 0], [1, 2]])
    with torch.no_grad():
        y = branches(x, Routes(index, torch.ones(2, 2)))
        for n, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            copied = branches.copy_of(int(index[n, j]))
            torch.testing.assert_close(y[n, j], copied(x[n : n + 1])[0], check_stride=False)


def test_synchronised_norms_take_the_norms_place():
    conv = layer("both", padding=1)
    x = images()
    expected = conv(x)
    synchronise_batch_norm(conv)
    assert type(conv.norm_inner).__name__ == "SynchronisedBatchNorm2d"
    assert_same(conv(x), expected)


def test_prints():
    text = repr(FactorizedConv2d(3, 4, 3, norm="outer"))
    assert "vertical_first, rank=4, inner=relu, norm=outer" in text
