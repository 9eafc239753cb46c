"""Chains of convolutions that are trained as such and contract to one, exactly."""

import copy
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.nn import ExpandedConv2d
from pyeff.nn.expansion_cost import conv_forms, trains_faster_contracted

C, OUT = 4, 8


def layer(kernel=3, *, channels=(C, OUT), **options):
    return ExpandedConv2d(*channels, kernel, dtype=torch.float64, **options)


def images(size=(13, 16), channels=C):
    return torch.randn(2, channels, *size, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def chain(conv, x):
    """The layer by its members."""
    for member in conv.members:
        x = member(x)
    return x


def outputs_and_gradients(conv, x):
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in conv.parameters())]


GRID = [("cl", k) for k in (1, 2, 3, 5, 7)] + [("ck", k) for k in (5, 7, 9, 11)]


@pytest.mark.parametrize(("mode", "kernel"), GRID)
@pytest.mark.parametrize("groups", [1, 2, C])
def test_forms_and_contraction_are_equal(mode, kernel, groups):
    """The grid of the digest's section 8.6, borders included, in float64."""
    paddings = [0, kernel // 2, kernel + 1]
    for bias, stride, padding in product([True, False], [1, 2, (1, 3)], paddings):
        options = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
        conv = layer(kernel, mode=mode, rate=2, form="expanded", **options)
        x = images()
        expanded = outputs_and_gradients(conv, x)
        assert_same(expanded[0], chain(conv, x))
        conv.form = "contracted"
        for actual, expected in zip(outputs_and_gradients(conv, x), expanded, strict=True):
            assert_same(actual, expected)
        plain = conv.contract()
        assert type(plain) is nn.Conv2d
        assert (plain.bias is not None) == bias
        assert_same(plain(x), expanded[0])
        twin = nn.Conv2d(C, OUT, kernel, **options)
        assert repr(plain) == repr(twin)
        assert plain.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("mode", ["cl", "ck"])
@pytest.mark.parametrize("options", [{"padding": (2, 3)}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_padding(padding_mode, mode, options, dilation):
    conv = layer(5, mode=mode, padding_mode=padding_mode, dilation=dilation, **options)
    x = images()
    plain = conv.contract()
    assert plain.padding_mode == padding_mode
    for form in ("expanded", "contracted"):
        conv.form = form
        assert_same(conv(x), plain(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (4, 3), ((4, 3), 1), ((3, 6), (2, 1))])
def test_uneven_same_padding_of_even_kernels(padding_mode, kernel, dilation):
    conv = layer(kernel, padding="same", padding_mode=padding_mode, dilation=dilation)
    x = images()
    plain = conv.contract()
    assert plain.padding == "same"
    for form in ("expanded", "contracted"):
        conv.form = form
        assert_same(conv(x), plain(x))
        assert conv(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize("kernel", [(5, 3), (3, 7), (1, 5), (9, 1), (5, 9)])
@pytest.mark.parametrize("groups", [1, 2])
def test_rectangular_kernels(kernel, groups):
    padding = (kernel[0] // 2, kernel[1] // 2)
    options = {"padding": padding, "stride": (2, 1), "dilation": (1, 2), "groups": groups}
    x = images((21, 22))
    for mode in ("cl", "ck"):
        conv = layer(kernel, mode=mode, **options)
        plain = conv.contract()
        assert plain.kernel_size == kernel
        for form in ("expanded", "contracted"):
            conv.form = form
            assert_same(conv(x), plain(x))
    assert [member.kernel_size for member in layer((5, 9), mode="ck").members] == [
        (3, 3),
        (3, 3),
        (1, 3),
        (1, 3),
    ]


def with_padding_at(conv, paddings):
    """The chain with the padding of each member as given."""
    conv = copy.deepcopy(conv)
    for member, padding in zip(conv.members, paddings, strict=True):
        member.padding = (padding, padding)
    return conv


def test_padding_on_the_middle_of_cl_is_wrong_at_borders():
    """Negative: the first bias does not reach the padded zeros."""
    conv = layer(7, mode="cl", padding=3)
    x, plain = images(), conv.contract()
    wrong = with_padding_at(conv, (0, 3, 0))
    error = (chain(wrong, x) - plain(x)).abs()
    assert error.max() > 1e-3
    assert error[:, :, 3:-3, 3:-3].max() < 1e-10
    with torch.no_grad():
        wrong.members[0].bias.zero_()
        conv.members[0].bias.zero_()
    assert_same(chain(wrong, x), conv.contract()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_padding_on_each_member_of_ck_is_wrong_at_borders(bias):
    """Negative: even without biases."""
    conv = layer(7, mode="ck", padding=3, bias=bias)
    x, plain = images(), conv.contract()
    error = (chain(with_padding_at(conv, (1, 1, 1)), x) - plain(x)).abs()
    assert error.max() > 1e-3
    assert error[:, :, 3:-3, 3:-3].max() < 1e-10


def test_plans():
    """Widths, kernels and strides of the digest's table in section 6.2."""
    conv = ExpandedConv2d(3, 8, 7, 2, 3, mode="cl", rate=4)
    assert [(m.in_channels, m.out_channels) for m in conv.members] == [(3, 12), (12, 32), (32, 8)]
    assert [m.kernel_size[0] for m in conv.members] == [1, 7, 1]
    assert [m.stride[0] for m in conv.members] == [1, 2, 1]
    assert [m.padding[0] for m in conv.members] == [3, 0, 0]
    conv = ExpandedConv2d(3, 8, 9, 2, 4, 2)
    assert conv.mode == "ck"
    assert conv.widths == (12, 32, 32)
    assert [m.kernel_size[0] for m in conv.members] == [3, 3, 3, 3]
    assert [m.stride[0] for m in conv.members] == [1, 1, 1, 2]
    assert [m.dilation[0] for m in conv.members] == [2, 2, 2, 2]
    conv = ExpandedConv2d(6, 12, 3, groups=6, rate=4)
    assert conv.mode == "cl"
    assert conv.widths == (24, 48)
    assert [m.groups for m in conv.members] == [6, 6, 6]
    assert ExpandedConv2d(6, 6, 3, groups=3, rate=0.5).widths == (3, 3)
    assert ExpandedConv2d(6, 6, 3, rate=1.5).widths == (9, 9)
    assert ExpandedConv2d(3, 64, 11, widths=(3, 6, 128, 128)).widths == (3, 6, 128, 128)
    for kernel, mode in ((1, "cl"), (3, "cl"), (4, "cl"), (5, "ck"), ((5, 3), "cl"), (6, "cl")):
        assert ExpandedConv2d(3, 8, kernel).mode == mode


def test_biases():
    has = [m.bias is not None for m in ExpandedConv2d(3, 8, 7).members]
    assert has == [True, True, True]
    has = [m.bias is not None for m in ExpandedConv2d(3, 8, 7, inner_bias=False).members]
    assert has == [False, False, True]
    has = [m.bias is not None for m in ExpandedConv2d(3, 8, 7, bias=False).members]
    assert has == [False, False, False]


def test_members_start_as_convolutions_do():
    torch.manual_seed(3)
    conv = ExpandedConv2d(3, 8, 5, padding=2)
    torch.manual_seed(3)
    first, second = nn.Conv2d(3, 12, 3, padding=2), nn.Conv2d(12, 8, 3)
    assert torch.equal(conv.members[0].weight, first.weight)
    assert torch.equal(conv.members[1].bias, second.bias)
    assert list(conv.state_dict()) == [
        f"members.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")
    ]


def test_gradcheck_of_the_contracted_form():
    conv = layer(2, channels=(1, 2), rate=1, padding=1, stride=2, form="contracted")
    x = images((2, 3), 1)[:1].requires_grad_()
    names, weights = zip(*conv.named_parameters(), strict=True)

    def run(x, *weights):
        return torch.func.functional_call(conv, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights), atol=1e-4)


@pytest.mark.parametrize("mode", ["cl", "ck"])
def test_inference_runs_the_contracted_layer(mode):
    conv = layer(5, mode=mode, padding=2, form="expanded").eval()
    x, plain = images(), conv.contract()
    calls = []
    for member in conv.members:
        member.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(conv(x), plain(x))
        assert calls == []
        conv.train()
        assert_same(conv(x), plain(x))
    assert len(calls) == len(conv.members)
    conv.eval()(x)
    assert len(calls) == 2 * len(conv.members), "with gradients the form counts"


def test_the_kept_kernel_is_never_stale():
    conv, x = layer(5, padding=2).eval(), images()

    def check():
        with torch.no_grad():
            for _ in range(2):
                assert_same(conv(x), chain(conv, x))

    check()
    held = conv._held._held
    check()
    assert conv._held._held is held, "it is composed once"
    for parameter in conv.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        check()
    conv.load_state_dict(layer(5, padding=2).state_dict())
    check()
    conv.load_state_dict(layer(5, padding=2).state_dict(), assign=True)
    check()
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, fused=True)
    conv(x).square().sum().backward()
    optimizer.step()
    check()
    for _ in range(3):
        conv.float().double()
        check()
    conv.members[0] = nn.Conv2d(C, 4 * C, 3, padding=2).double()
    check()
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        with torch.no_grad():
            before = conv(x)
            twin.members[1].weight.zero_()
            assert_same(twin(x), chain(twin, x))
            assert torch.equal(conv(x), before)
    with torch.inference_mode():
        assert_same(conv(x), chain(conv, x))


def test_training_without_gradients_keeps_the_kernel():
    conv, x = layer(5, padding=2, form="contracted"), images()
    with torch.no_grad():
        assert_same(conv(x), chain(conv, x))
        held = conv._held._held
        conv(x)
    assert held is not None
    assert conv._held._held is held
    conv(x).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


@pytest.mark.parametrize("form", ["expanded", "contracted", "auto"])
def test_trains_to_the_same_function(form):
    """Ten steps of either form; then the contracted layer stands for what was trained."""
    torch.manual_seed(1)
    conv = layer(5, padding=2, form=form)
    reference = layer(5, padding=2, form="expanded")
    reference.load_state_dict(conv.state_dict())
    x, target = images(), images(channels=OUT)
    for model in (conv, reference):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    assert_same(conv.contract().weight, reference.contract().weight)
    assert_same(conv.contract()(x), reference(x))


def test_auto_takes_the_cheaper_form(monkeypatch):
    calls = []
    conv = layer(3, channels=(64, 64), padding=1)
    conv.members[0].register_forward_hook(lambda *_: calls.append(1))
    few, many = images((1, 1), 64)[:1], images((16, 16), 64)
    forms = [conv_forms(conv._kernels(), x, conv._edges) for x in (few, many)]
    assert not trains_faster_contracted(forms[0], few)
    assert trains_faster_contracted(forms[1], many)
    assert trains_faster_contracted(forms[0], few.to("meta")), "nothing else was measured"
    conv(many)
    assert calls == []
    conv(few)
    assert calls == [1]
    with torch.no_grad():
        conv(few)
    assert calls == [1], "without gradients the kernel is kept"


def test_counts_of_the_forms():
    """CL, 4 -> 8 channels, 5 x 5 kernel with stride 2 on 9 x 10 padded to 11 x 12, two images."""
    conv = layer(5, mode="cl", stride=2, padding=1, groups=2, rate=2)
    expanded, contracted = conv_forms(conv._kernels(), images((9, 10)), conv._edges)
    wide, small = 2 * 11 * 12, 2 * 4 * 4
    macs = wide * 8 * 2 + small * 16 * 4 * 25 + small * 8 * 8
    weights = 8 * 2 + 16 * 4 * 25 + 8 * 8
    assert expanded[:5] == (3, 0, macs, wide * 8 + small * (16 + 8), weights)
    assert contracted[:5] == (1, 0, small * 8 * 2 * 25, small * 8, 8 * 2 * 25)
    dense = conv_forms(layer(5, mode="ck", rate=2)._kernels(), images((9, 10)), (0, 0, 0, 0))
    assert dense.contracted[:3] == (1, 2 * 5 * 6 * 8 * 4 * 25, 0)
    # Per group 2 -> 4 -> 8 -> 4 channels: from the start 8 * 4 * 2 and 4 * 8 * 2 products a tap,
    # from the end 4 * 8 * 4 and 4 * 4 * 2.
    assert contracted.compositions == 2
    assert contracted.composition_macs == 2 * 25 * (8 * 4 * 2 + 4 * 8 * 2)
    assert conv_forms(conv._kernels(), images((9, 10))[0], conv._edges)[1].values == 4 * 4 * 8


@pytest.mark.parametrize("form", ["expanded", "auto"])
def test_compiles_whole(form):
    conv, x = ExpandedConv2d(C, OUT, 5, padding=2, form=form), images((7, 6)).float()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        outputs_and_gradients(compiled, x), outputs_and_gradients(conv, x), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    conv.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_exports_with_any_size():
    conv, x = layer(5, padding=2).eval(), images()
    shapes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=5)},)
    program = torch.export.export(conv, (x,), dynamic_shapes=shapes).module()
    x = torch.randn(3, C, 9, 16, dtype=torch.float64)
    assert_same(program(x), conv(x))


@pytest.mark.parametrize("form", ["expanded", "contracted"])
def test_autocast(form):
    """The weights are composed in float32: only the convolution itself rounds."""
    conv, x = ExpandedConv2d(C, OUT, 5, padding=2, form=form), images().float()
    expected = conv.contract()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        if form == "contracted":
            assert torch.equal(y, conv._convolve(x, conv.composed()))
            assert conv.composed().weight.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.03)
    assert all(p.grad.dtype == torch.float32 for p in conv.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    conv, x = layer(5, padding=2, form="contracted").to(dtype), images().to(dtype)
    plain = conv.contract()
    expected = copy.deepcopy(conv).double().contract()
    assert plain.weight.dtype == dtype
    assert torch.equal(plain.weight, expected.weight.to(dtype)), "rounded once"
    assert torch.equal(conv._fold().weight, conv.composed(torch.float32).weight.to(dtype))
    torch.testing.assert_close(conv(x).double(), expected(x.double()), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("form", ["expanded", "contracted", "auto"])
def test_inputs_of_every_kind(form):
    conv, x = layer(5, padding=2, stride=2, form=form), images()
    expected = conv.contract()(x)
    y = conv(x.contiguous(memory_format=torch.channels_last))
    assert_same(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(conv(x[0]), expected[0])
    wide = torch.zeros(2, C + 3, 13, 16, dtype=torch.float64)
    wide[:, 1 : 1 + C] = x
    assert_same(conv(wide[:, 1 : 1 + C]), expected)
    empty = conv(x[:0])
    assert empty.shape == (0, *expected.shape[1:])
    empty.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in conv.parameters())
    on_meta = ExpandedConv2d(C, OUT, 5, padding=2, stride=2, form=form, device="meta")
    assert on_meta(x.float().to("meta")).shape == expected.shape


def test_contract_keeps_flags():
    conv = ExpandedConv2d(C, OUT, 5, dtype=torch.float32)
    state = torch.get_rng_state()
    plain = conv.contract()
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.training
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    plain = conv.eval().requires_grad_(False).contract()
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())
    with torch.no_grad():
        conv.members[0].weight.fill_(1e30)
        conv.members[1].weight.fill_(1e-30)
    assert conv.contract().weight.isfinite().all(), "in float64 between the members"


def test_product_norm():
    conv = layer(5)
    norm = conv.product_norm()
    assert_same(norm, conv.contract().weight.square().sum())
    (norm / 2).backward()
    weight = conv.composed().weight
    expected = torch.autograd.grad(weight, conv.members[0].weight, weight.detach())[0]
    assert_same(conv.members[0].weight.grad, expected)
    assert conv.members[0].bias.grad is None


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_non_linear_chain_is_a_start(activation):
    conv = layer(7, padding=3, activation=activation)
    x = images()
    act = getattr(F, activation)
    expected = conv.members[2](act(conv.members[1](act(conv.members[0](x)))))
    assert_same(conv(x), expected)
    conv.eval()
    with torch.no_grad():
        assert_same(conv(x), expected)
    for call in (conv.contract, conv.composed, conv.product_norm):
        with pytest.raises(ValueError, match=r"ExpandedConv2d: activation must be None to contrac"):
            call()
    with pytest.raises(ValueError, match="ExpandedConv2d: form must be 'expanded' or 'auto' with"):
        conv.form = "contracted"
    linear = layer(7, padding=3)
    linear.load_state_dict(conv.state_dict())
    assert_same(linear(x), chain(conv, x))


def test_a_member_that_was_replaced_is_called():
    conv, x = layer(5, padding=2, form="contracted"), images()
    expected = conv(x)
    conv.members[1] = nn.Sequential(conv.members[1], nn.Identity())
    assert_same(conv(x), expected)
    conv.eval()
    with torch.no_grad():
        assert_same(conv(x), expected)
    message = r"ExpandedConv2d: members must be plain nn\.Conv2d to contract, got Sequential"
    with pytest.raises(TypeError, match=message):
        conv.contract()


def test_traced_by_its_members():
    conv, x = layer(5, padding=2), images()
    traced = torch.fx.symbolic_trace(nn.Sequential(conv))
    assert_same(traced(x), conv(x))


def test_prints():
    text = repr(ExpandedConv2d(3, 8, 7, activation="relu"))
    assert "3, 8, kernel_size=(7, 7), mode=ck, widths=(12, 32), form=auto, activation=relu" in text


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 3), {}, "in_channels and out_channels must be positive, got 0 and 4"),
        ((4, 6, 3), {"groups": 4}, "groups must divide in_channels 4 and out_channels 6, got 4"),
        ((4, 4, 3), {"groups": 0}, "groups must divide in_channels 4 and out_channels 4, got 0"),
        ((4, 4, 0), {}, "kernel_size must be at least 1, got 0"),
        ((4, 4, (3, 3, 3)), {}, r"kernel_size must be one int or two, got \(3, 3, 3\)"),
        ((4, 4, 3, 0), {}, "stride must be at least 1, got 0"),
        ((4, 4, 3, 1, -1), {}, "padding must be at least 0, got -1"),
        ((4, 4, 3, 1, "full"), {}, 'padding must be ints, "same" or "valid", got \'full\''),
        ((4, 4, 3, 2, "same"), {}, r'padding "same" must have stride 1, got \(2, 2\)'),
        ((4, 4, 3, 1, 0, 0), {}, "dilation must be at least 1, got 0"),
        ((4, 4, 3), {"padding_mode": "mirror"}, "padding_mode must be one of 'zeros', .*'mirror'"),
        ((4, 4, 3), {"mode": "fc"}, "mode must be one of 'auto', 'cl', 'ck', got 'fc'"),
        ((4, 4, 4), {"mode": "ck"}, r"kernel_size must be odd for mode 'ck', .* got \(4, 4\)"),
        ((4, 4, (5, 4)), {"mode": "ck"}, r"kernel_size must be odd for mode 'ck', .*\(5, 4\)"),
        ((4, 4, 3), {"mode": "ck"}, r"kernel_size must have a side of 5 or more .* got \(3, 3\)"),
        ((4, 4, 3), {"rate": 0}, "rate must be positive, got 0"),
        ((4, 4, 3), {"rate": float("nan")}, "rate must be positive, got nan"),
        ((4, 4, 3), {"widths": (8,)}, r"widths must be 2 numbers for 3 members, got \(8,\)"),
        ((4, 4, 3), {"widths": (8, 0)}, r"widths must be positive, got \(8, 0\)"),
        (
            (4, 4, 3),
            {"widths": (8, 7), "groups": 2},
            r"widths must be positive multiples of the 2 groups, got \(8, 7\)",
        ),
        ((4, 4, 3), {"form": "both"}, "form must be one of 'auto', 'expanded', 'contracted'"),
        ((4, 4, 3), {"activation": "gelu"}, "activation must be one of None, 'relu', .*'gelu'"),
        (
            (4, 4, 3),
            {"activation": "relu", "form": "contracted"},
            "form must be 'expanded' or 'auto' with an activation between the members",
        ),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=f"ExpandedConv2d: {message}"):
        ExpandedConv2d(*arguments, **options)
