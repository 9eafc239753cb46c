"""What a layer with composed weights keeps, and where it must not."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils import prune

from pyeff.convert import expand
from pyeff.nn import ConvNorm2d, ExpandedConv2d, ExpandedLinear


def conv(form="contracted"):
    return ExpandedConv2d(3, 4, 5, padding=2, mode="ck", rate=2, form=form).double()


def linear(form="contracted"):
    return ExpandedLinear(6, 5, rate=2, form=form).double()


def normed(form=None):
    return ConvNorm2d(nn.Conv2d(3, 4, 3, padding=1)).double()


LAYERS = {"conv": conv, "linear": linear, "norm": normed}
INPUTS = {"conv": (2, 3, 7, 6), "linear": (4, 6), "norm": (2, 3, 7, 6)}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().eval()


@pytest.fixture
def x(request):
    name = request.node.callspec.params["layer"]
    return torch.randn(INPUTS[name], dtype=torch.float64)


def detached(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_by_the_weights(layer, x, grad):
    params = detached(layer)
    tangents = {name: torch.randn_like(p) for name, p in params.items()}

    def run(p):
        return functional_call(layer, p, (x,))

    with torch.no_grad():
        layer(x)  # something is kept
    with torch.set_grad_enabled(grad):
        _, slope = jvp(run, (params,), (tangents,))
        eps = 1e-6
        up, down = (
            run({n: p + sign * eps * tangents[n] for n, p in params.items()}) for sign in (1, -1)
        )
    torch.testing.assert_close(slope, (up - down) / (2 * eps), rtol=1e-5, atol=1e-7)


def test_an_ensemble_under_vmap(layer, x):
    many = [copy.deepcopy(layer) for _ in range(3)]
    for member in many:
        for parameter in member.parameters():
            nn.init.normal_(parameter)
    params, buffers = stack_module_state(many)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in many])
        got = vmap(lambda p, b: functional_call(layer, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(got, expected)


def test_fake_tensors_leave_nothing_behind(layer, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = layer(mode.from_tensor(x))
    assert isinstance(fake, FakeTensor)
    with torch.no_grad():
        real = layer(x)
    assert not isinstance(real, FakeTensor)
    torch.testing.assert_close(real, layer(x).detach())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_computes_what_the_layer_does(layer, x, grad):
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(x + 1), layer(x + 1))


def test_updates_by_hand_are_seen_when_the_mode_changes(layer, x):
    with torch.no_grad():
        before = layer(x)
        layer.train()
        for parameter in layer.parameters():
            parameter.data += 0.5  # raises no version
        layer.eval()
        after = layer(x)
        fresh = copy.deepcopy(layer)(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh)


HOOKED = {
    "weight_norm": (torch.nn.utils.weight_norm, "weight_g"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight_orig"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("hook", HOOKED)
@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("form", ["auto", "contracted", "expanded"])
def test_weights_that_hooks_compute_run_member_by_member(make, hook, form):
    layer = make(form)
    x = torch.randn(INPUTS[make.__name__], dtype=torch.float64)
    apply, name = HOOKED[hook]
    apply(layer.members[0])
    for _ in range(2):  # the second step fails where the graph of the first is kept
        layer(x).sum().backward()
    layer.eval()
    with torch.no_grad():
        layer(x)
        getattr(layer.members[0], name).mul_(3)
        expected = x
        for member in layer.members:
            expected = member(expected)
        torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError, match=r"to contract, got (Conv2d|Linear) with hooks"):
        layer.contract()


@pytest.mark.parametrize("make", [conv, linear])
def test_parametrized_members_are_contracted(make):
    layer = make().eval()
    nn.utils.parametrizations.weight_norm(layer.members[0])
    x = torch.randn(INPUTS[make.__name__], dtype=torch.float64)
    expected = x
    for member in layer.members:
        expected = member(expected)
    assert layer.is_whole
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.contract()(x), expected)


@pytest.mark.parametrize("plain", [nn.Conv2d(3, 4, 3), nn.Linear(6, 5)])
def test_a_bias_alone_may_be_trained(plain):
    plain.weight.requires_grad_(False)
    plain.bias.requires_grad_(True)
    kind = ExpandedConv2d if isinstance(plain, nn.Conv2d) else ExpandedLinear
    assert all(p.requires_grad for p in kind.from_compact(plain).parameters())
    plain.bias.requires_grad_(False)
    assert not any(p.requires_grad for p in kind.from_compact(plain).parameters())


@pytest.mark.parametrize(
    ("kernel", "rate", "tolerance"), [(5, 4, 1e-5), (7, 3, 1e-5), (9, 3, 2e-5), (11, 3, 2e-4)]
)
def test_small_kernels_compute_the_same_in_float32(kernel, rate, tolerance):
    plain = nn.Conv2d(4, 8, kernel, padding=kernel // 2)
    layer = ExpandedConv2d.from_compact(plain, mode="ck", rate=rate)
    x = torch.randn(2, 4, 13, 12)
    expected = plain.double()(x.double())
    error = (layer._by_members(x) - expected).abs().max() / expected.abs().max()
    assert error.item() < tolerance


def test_auto_takes_the_chain_that_can_compute_the_same():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 5)).double()
    large = expand(net, rate=2, from_compact=True)
    assert [type(layer) for layer in large] == [ExpandedConv2d, nn.ReLU, ExpandedConv2d]
    assert large[2].mode == "cl"
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    torch.testing.assert_close(large(x), net(x))
    with pytest.raises(ValueError, match=r"'2'.*widths must be larger"):
        expand(net, rate=2, mode="ck", layers=["2"], from_compact=True)
