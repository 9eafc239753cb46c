"""Three linear layers that are trained as such and contract to one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.nn import ExpandedLinear
from pyeff.nn.expansion_cost import linear_forms, trains_faster_contracted


def layer(features=(6, 5), **options):
    return ExpandedLinear(*features, dtype=torch.float64, **options)


def vectors(*shape):
    return torch.randn(*(shape or (3,)), 6, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def chain(linear, x):
    for member in linear.members:
        x = member(x)
    return x


def outputs_and_gradients(linear, x):
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in linear.parameters())]


@pytest.mark.parametrize("features", [(6, 5), (6, 9), (6, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner_bias", [True, False])
def test_forms_and_contraction_are_equal(features, bias, inner_bias):
    linear = layer(features, bias=bias, inner_bias=inner_bias, form="expanded")
    for x in (vectors(), vectors(2, 3), vectors(0), vectors()[0]):
        expanded = outputs_and_gradients(linear, x)
        linear.form = "contracted"
        for actual, expected in zip(outputs_and_gradients(linear, x), expanded, strict=True):
            assert_same(actual, expected)
        linear.form = "expanded"
        plain = linear.contract()
        assert type(plain) is nn.Linear
        assert repr(plain) == repr(nn.Linear(*features, bias))
        assert_same(plain(x), expanded[0])


def test_plan():
    assert layer((6, 5), rate=4).widths == (24, 20)
    assert layer((6, 5), rate=0.5).widths == (3, 2)
    linear = layer((6, 5), widths=(7, 8))
    assert [(m.in_features, m.out_features) for m in linear.members] == [(6, 7), (7, 8), (8, 5)]
    assert [m.bias is not None for m in linear.members] == [True] * 3
    assert [m.bias is not None for m in layer(inner_bias=False).members] == [False, False, True]
    assert [m.bias is not None for m in layer(bias=False).members] == [False] * 3


def test_inference_runs_the_contracted_layer():
    linear, x = layer(form="expanded").eval(), vectors()
    plain = linear.contract()
    calls = []
    linear.members[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(linear(x), plain(x))
        assert calls == []
        linear.train()(x)
    assert calls == [1]


def test_the_kept_weight_is_never_stale():
    linear, x = layer().eval(), vectors()

    def check():
        with torch.no_grad():
            for _ in range(2):
                assert_same(linear(x), chain(linear, x))

    check()
    held = linear._held._held
    check()
    assert linear._held._held is held, "it is composed once"
    for parameter in linear.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        check()
    linear.load_state_dict(layer().state_dict(), assign=True)
    check()
    linear.float().double()
    check()
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        with torch.no_grad():
            twin.members[1].weight.zero_()
            assert_same(twin(x), chain(twin, x))
    check()


def test_gradcheck_of_the_contracted_form():
    linear = ExpandedLinear(2, 2, rate=1, form="contracted", dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*linear.named_parameters(), strict=True)

    def run(x, *weights):
        return torch.func.functional_call(linear, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_auto_takes_the_cheaper_form():
    features, x = (512, 2048, 256, 64), torch.empty(0)
    forms = linear_forms(features, 1)
    assert not trains_faster_contracted(forms, x)
    assert trains_faster_contracted(linear_forms(features, 100_000), x)
    assert trains_faster_contracted(forms, x.to("meta")), "nothing else was measured"
    chain = 512 * 2048 + 2048 * 256 + 256 * 64
    assert forms.expanded[-2:] == (3, chain)
    assert not any(forms.expanded[:-2] + forms.contracted[:-2])
    composed = 2048 * 256 * 64 + 512 * 2048 * 64
    assert forms.contracted[-2:] == (3, composed + 512 * 64)
    linear, calls = ExpandedLinear(512, 64), []
    linear.members[0].register_forward_hook(lambda *_: calls.append(1))
    linear(torch.randn(1, 512))
    assert calls == [1]
    linear.form = "contracted"
    linear(torch.randn(1, 512))
    assert calls == [1]


def test_compiles_whole_and_exports():
    linear, x = layer(), vectors()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), linear(x))
    torch._dynamo.reset()
    linear.eval()
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(linear, (x,), dynamic_shapes=shapes).module()
    x = vectors(7)
    assert_same(program(x), linear(x))


def test_halves_and_autocast():
    linear, x = layer(form="contracted").float(), vectors().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
        assert linear.composed()[0].dtype == torch.float32
        assert torch.equal(y, F.linear(x, *linear.composed()))
    half, wide = copy.deepcopy(linear).bfloat16(), copy.deepcopy(linear).bfloat16().double()
    assert torch.equal(half.contract().weight, wide.contract().weight.bfloat16())
    assert torch.equal(half._fold()[0], half.composed(torch.float32)[0].bfloat16())


def test_contract_keeps_flags():
    linear = layer()
    assert linear.contract().training
    assert all(p.requires_grad and p.is_leaf for p in linear.contract().parameters())
    plain = linear.eval().requires_grad_(False).contract()
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())


def test_product_norm():
    linear = layer()
    norm = linear.product_norm()
    assert_same(norm, linear.contract().weight.square().sum())
    norm.backward()
    assert linear.members[0].weight.grad is not None
    assert linear.members[0].bias.grad is None


def test_a_non_linear_chain_is_a_start():
    linear, x = layer(activation="relu"), vectors()
    members = linear.members
    assert_same(linear(x), members[2](members[1](members[0](x).relu()).relu()))
    with torch.no_grad():
        assert_same(linear.eval()(x), members[2](members[1](members[0](x).relu()).relu()))
    for call in (linear.contract, linear.composed, linear.product_norm):
        with pytest.raises(ValueError, match="ExpandedLinear: activation must be None to contract"):
            call()
    with pytest.raises(ValueError, match="ExpandedLinear: form must be 'expanded' or 'auto' with"):
        linear.form = "contracted"
    plain = layer()
    plain.load_state_dict(linear.state_dict())
    assert_same(plain(x), chain(linear, x))


def test_a_member_that_was_replaced_is_called():
    linear, x = layer(form="contracted"), vectors()
    expected = linear(x)
    linear.members[1] = nn.Sequential(linear.members[1])
    assert_same(linear(x), expected)
    message = r"ExpandedLinear: members must be plain nn\.Linear to contract, got Sequential"
    with pytest.raises(TypeError, match=message):
        linear.contract()


def test_prints():
    text = repr(ExpandedLinear(6, 5, activation="relu"))
    assert "6, 5, widths=(24, 20), form=auto, activation=relu" in text


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "in_features and out_features must be positive, got 0 and 4"),
        ((4, 4), {"rate": -1}, "rate must be positive, got -1"),
        ((4, 4), {"widths": (8,)}, r"widths must be 2 numbers for 3 members, got \(8,\)"),
        ((4, 4), {"widths": (8, 0)}, r"widths must be positive, got \(8, 0\)"),
        ((4, 4), {"form": "both"}, "form must be one of 'auto', 'expanded', 'contracted'"),
        ((4, 4), {"activation": "gelu"}, "activation must be one of None, 'relu', .*'gelu'"),
        (
            (4, 4),
            {"activation": "relu", "form": "contracted"},
            "form must be 'expanded' or 'auto' with an activation between the members",
        ),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=f"ExpandedLinear: {message}"):
        ExpandedLinear(*arguments, **options)
