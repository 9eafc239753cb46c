import json

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms
from torch import nn

import pyeff
from pyeff.models import build, build_backbone, dec3, decomposeme, resnet50_decomposed
from pyeff.nn import FactorizedConv2d

WIDTHS = (4, 4, 6, 6, 8, 8, 8, 8)
SMALL = {
    "dec8": lambda **kw: decomposeme(5, WIDTHS, **kw),
    "dec8 skip": lambda **kw: decomposeme(5, WIDTHS, skip=True, **kw),
    "dec3": lambda **kw: dec3(6, classes=5, in_channels=3, **kw),
    "resnet50": lambda **kw: resnet50_decomposed(
        5, widths=(8, 16, 24, 32), depths=(1, 1, 2, 1), **kw
    ),
}


def small(name, **options):
    return randomise_norms(SMALL[name](**options)).double().eval()


def images(size=32, n=2, channels=3):
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("width", "millions"), [(512, 7.20), (640, 11.12), (768, 15.18)])
def test_parameters_of_the_table(width, millions):
    with torch.device("meta"):
        model = decomposeme(width=width)
    assert round(count(model) / 1e6, 2) == millions
    pairs = [m for m in model.modules() if isinstance(m, FactorizedConv2d)]
    assert [pair.norm for pair in pairs] == ["both"] * 8
    assert sum(m.weight.ndim == 4 for m in model.modules() if isinstance(m, nn.Conv2d)) == 16


def test_the_skip_variant_has_24_one_dimensional_layers():
    with torch.device("meta"):
        model = decomposeme(skip=True)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 24


def test_parameters_of_resnet50():
    with torch.device("meta"):
        assert count(resnet50_decomposed()) == 21_784_616
        assert count(resnet50_decomposed(inner_norm=True)) == 21_792_168
        assert count(build_backbone("resnet50", 1000)) == 25_557_032


def test_where_resnet50_halves_the_map():
    with torch.device("meta"):
        blocks = resnet50_decomposed().blocks
    strided = [block.conv2 for block in blocks if block.conv2.stride != (1, 1)]
    assert [(c.first.stride, c.second.stride) for c in strided] == [((2, 1), (1, 2))] * 3


def pair(layer, x):
    """A layer's members one after another, with a ReLU at the end."""
    if not isinstance(layer, FactorizedConv2d):
        return F.relu(layer.norm(layer.conv(x)))
    y = layer.first(x)
    y = F.relu(y if layer.norm_inner is None else layer.norm_inner(y))
    y = layer.second(y)
    return F.relu(y if layer.norm_outer is None else layer.norm_outer(y))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": None}, {"order": "horizontal_first", "norm": "outer"}, {"dense": True}],
    ids=str,
)
def test_dec8_is_what_the_table_says(options):
    model, x = small("dec8", **options), images()
    y = x
    for number, layer in enumerate(model.layers, 1):
        y = pair(layer, y)
        if number in (1, 2, 4, 6):
            y = F.max_pool2d(y, 2)
    expected = y.mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_skips_lead_around_two_pairs():
    model = small("dec8 skip")
    x = images()
    y = model.layers[6](torch.randn(2, 8, 4, 4, dtype=torch.float64), outer="relu")
    first, second = model.skips["7"]
    both = second(pair(first, y))
    torch.testing.assert_close(second(pair(first, y), residual=y), both + y)
    before = model(x)
    with torch.no_grad():
        for skipped in model.skips.values():
            skipped[1].norm_outer.weight.zero_()
            skipped[1].norm_outer.bias.zero_()
    plain = small("dec8")
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if "skips" not in n})
    # A residual of zeros leaves what was positive already.
    torch.testing.assert_close(model(x), plain(x))
    assert not torch.allclose(before, plain(x))


def test_dec8_without_the_activation_inside_is_a_network_of_3_x_3_convolutions():
    model = small("dec8", inner=None, norm="outer")
    assert [layer.first.bias for layer in model.layers] == [None] * 8
    y = x = images()
    for number, layer in enumerate(model.layers, 1):
        weight = torch.einsum(
            "lcy,flx->fcyx", layer.first.weight.squeeze(3), layer.second.weight.squeeze(2)
        )
        y = F.relu(layer.norm_outer(F.conv2d(y, weight, layer.second.bias, padding=1)))
        if number in (1, 2, 4, 6):
            y = F.max_pool2d(y, 2)
    expected = model.head(y.mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_dec3_halves_the_map_three_times_after_long_kernels():
    model = small("dec3")
    assert [layer.kernel_size[0] for layer in model.layers] == [9, 9, 7]
    x = images(24)
    y = x
    for layer in model.layers:
        y = F.max_pool2d(pair(layer, y), 2)
    assert y.shape[2:] == (3, 3)
    torch.testing.assert_close(model(x), model.head(y.mean((2, 3))), rtol=1e-10, atol=1e-10)
    assert dec3(4)(torch.randn(2, 1, 24, 24)).shape == (2, 36)


def test_resnet50_is_the_residual_network_with_pairs():
    """Its 3 x 3 convolutions rebuilt from its pairs, without the ReLU between them."""
    model = small("resnet50")
    plain = build_backbone("resnet50", 5, widths=(8, 16, 24, 32), depths=(1, 1, 2, 1))
    plain = plain.double().eval()
    for block in model.blocks:
        block.conv2.inner = None
    state = {}
    for name, value in model.state_dict().items():
        if ".conv2.first" in name:
            second = model.state_dict()[name.replace("first", "second")]
            state[name.replace("first.", "")] = torch.einsum(
                "lcy,flx->fcyx", value.squeeze(3), second.squeeze(2)
            )
        elif ".conv2.second" not in name:
            state[name.replace("conv2.norm_outer", "norm2")] = value
    plain.load_state_dict(state)
    x = images(64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    model = SMALL[name]()
    model(images(64).float()).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a batch norm in training moves nothing but rounding errors.
    assert not [n for n in missing if not n.endswith(("first.bias", "second.bias"))]


@pytest.mark.parametrize("name", SMALL)
def test_is_rebuilt_from_its_configuration_and_from_a_file(name, tmp_path):
    model = small(name, order="horizontal_first").float()
    twin = build(json.loads(json.dumps(model.config))).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    pyeff.save(model, tmp_path / "model.safetensors")
    loaded = pyeff.load(tmp_path / "model.safetensors")
    x = images(64).float()
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
        assert torch.equal(model(x), loaded(x))


def test_costs():
    pairs, dense = decomposeme(100).costs((32, 32)), decomposeme(100, dense=True).costs((32, 32))
    assert pairs.params == count(decomposeme(100))
    first = 3 * (3 * 64 + 64 * 64) * 32**2
    rest = pairs.macs - first - 512 * 100
    # Where a pair's rank is its number of outputs F: 3 (C + F) F for 9 C F multiply-adds.
    widths, sizes = (64, 128, 256, 256, 512, 512, 512, 512), (16, 8, 8, 4, 4, 2, 2)
    expected = zip(widths, widths[1:], sizes, strict=False)
    assert rest == sum(3 * (c + f) * f * size**2 for c, f, size in expected)
    expected = zip((3, *widths), widths, (32, *sizes), strict=False)
    assert dense.macs == sum(9 * c * f * s**2 for c, f, s in expected) + 512 * 100
    assert dec3(8).costs((24, 24)).params == count(dec3(8))


@pytest.mark.parametrize("name", ["dec8", "dec8 skip", "dec3"])
def test_no_image_and_other_channels(name):
    model = small(name)
    with torch.no_grad():
        assert model(images(n=0)).shape == (0, 5)
    with pytest.raises(ValueError, match="DecomposeMe: x must hold an image in training, got none"):
        model.train()(images(n=0))
    with pytest.raises(ValueError, match=r"DecomposeMe: x must be \[N, 3, H, W\] with at least"):
        model(images(channels=1))
    with pytest.raises(ValueError, match=r"at least (16|8) rows and columns, got \[2, 3, 7, 7\]"):
        model(images(7))
    assert decomposeme(5, WIDTHS, in_channels=1)(torch.randn(2, 1, 16, 16)).shape == (2, 5)


def test_fewer_poolings_for_small_images():
    model = decomposeme(5, WIDTHS, pools=(2, 4))
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert model.costs((32, 32)).macs > decomposeme(5, WIDTHS).costs((32, 32)).macs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decomposeme(width=100), "decomposeme: width must be 512, 640, 768 or 8 widths, g"),
        (
            lambda: decomposeme(width=(8, 8)),
            r"decomposeme: width must be 8 positive widths, got \[",
        ),
        (
            lambda: decomposeme(0),
            "decomposeme: classes and in_channels must be positive, got 0 and",
        ),
        (lambda: decomposeme(pools=(9,)), r"decomposeme: pools must be different layers in 1\.\.8"),
        (lambda: decomposeme(pools=(2, 2)), "decomposeme: pools must be different layers"),
        (lambda: decomposeme(norm="batch"), "decomposeme: norm must be one of None, 'inner'"),
        (
            lambda: decomposeme(inner="tanh", dense=True),
            "decomposeme: inner must be one of None, 'relu', .* got 'tanh'",
        ),
        (lambda: dec3(order="first", dense=True), "dec3: order must be one of 'vertical_first'"),
        (lambda: dec3(0), "dec3: width must be positive, got 0"),
        (lambda: dec3(8, classes=0), "dec3: classes and in_channels must be positive, got 0 and 1"),
        (lambda: resnet50_decomposed(order="first"), "order must be one of 'vertical_first'"),
        (lambda: resnet50_decomposed(0), "classes and in_channels must be positive, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        make()
