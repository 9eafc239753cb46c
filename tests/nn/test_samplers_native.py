"""ERFNet's samplers on the CPU kernels: against float64 of plain torch, and when they run."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff import _C
from pyeff.nn import ConvNorm2d, Downsampler, Upsampler
from pyeff.ops import _sampler_conv2d as samplers

# Of the largest result.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
LAYERS = {
    "image": lambda: Downsampler(3, 16),
    "erfnet, second": lambda: Downsampler(16, 64),
    "odd": lambda: Downsampler(9, 33),
    "narrow": lambda: Downsampler(4, 7),
    "up": lambda: Upsampler(64, 16),
    "up, odd": lambda: Upsampler(5, 7),
    "up, 2 x 2": lambda: transposed(16, 20, 2, 2),
    "up, 4 x 4, stride 3": lambda: transposed(6, 33, 4, 3, 1, 2),
    "up, uneven": lambda: transposed(7, 18, (3, 2), (1, 2), (0, 1)),
    "up, dilated": lambda: transposed(3, 5, 3, 2, 2, dilation=2),
}
SIZES = [(8, 8), (7, 9), (1, 1), (2, 33)]


def transposed(*args, **options):
    return ConvNorm2d(nn.ConvTranspose2d(*args, **options))


def made(name, dtype=torch.float32):
    return randomise_norms(LAYERS[name]()).eval().to(dtype)


def images(layer, size=(6, 8), n=2, dtype=torch.float32):
    return torch.randn(n, layer.conv.in_channels, *size).to(dtype)


def plainly(layer, x):
    """In float64, layer by layer, before the activation."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    if isinstance(layer, Downsampler):
        return layer.norm(torch.cat([layer.conv(x), F.max_pool2d(x, 2, 2, ceil_mode=True)], 1))
    return layer.norm(layer.conv(x))


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    made_calls = []
    kernel = _C.sampler_conv2d_forward

    class Counted:
        @staticmethod
        def sampler_conv2d_forward(*args):
            made_calls.append(args)
            return kernel(*args)

    monkeypatch.setattr(samplers, "_C", Counted)
    return made_calls


def assert_near(y, expected):
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=scale * TOLERANCE[y.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_equals_plain_torch(name, dtype, calls):
    layer = made(name, dtype)
    for size in SIZES:
        if name == "up, uneven" and size == (1, 1):
            continue  # no pixel is left
        for n in (0, 1, 2):
            x = images(layer, size, n, dtype)
            if n == 2:
                x = x.contiguous(memory_format=torch.channels_last)
            assert_near(run(layer, x), F.relu(plainly(layer, x)))
    assert len(calls) == 3 * (len(SIZES) - (name == "up, uneven"))


def run(layer, x):
    """With a ReLU at the end, which ERFNet's own layers have."""
    return layer(x, outer="relu") if type(layer) is ConvNorm2d else layer(x)


@pytest.mark.parametrize("isa", pyeff.info()["isas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_instruction_set(isa, dtype, calls):
    with pyeff.isa(isa):
        for name in ("image", "erfnet, second", "odd", "up", "up, 2 x 2"):
            layer = made(name, dtype)
            x = images(layer, (9, 40), dtype=dtype)
            assert_near(run(layer, x), F.relu(plainly(layer, x)))
    assert len(calls) == 5


@pytest.mark.parametrize("outer", [None, "relu", "relu6", "silu", "hardswish"])
@torch.no_grad()
def test_residual_and_activations(outer, calls):
    layer = made("up, odd", torch.float64)
    x, act = images(layer, dtype=torch.float64), getattr(F, outer) if outer else lambda t: t
    residual = torch.randn(2, 7, 12, 16, dtype=torch.float64)
    kept = residual.clone()
    expected = plainly(layer, x)
    assert_near(layer(x, residual, outer), act(expected + residual))
    assert_near(layer(x, None, outer), act(expected))
    assert torch.equal(residual, kept)
    assert len(calls) == 2


@torch.no_grad()
def test_threads_change_nothing():
    before = torch.get_num_threads()
    for name in ("image", "up"):
        layer = made(name)
        x = images(layer, (64, 96))
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layer(x))
        torch.set_num_threads(before)
        assert all(torch.equal(y, results[0]) for y in results)


@torch.no_grad()
def test_views_of_larger_maps(calls):
    """Channels apart, pixels apart, and a first pixel inside another map."""
    layer = made("narrow")
    whole = torch.randn(2, 9, 20, 22)
    for x in (whole[:, 2:6, 1:14, 3:20], whole[:, ::2][:, :4, ::2, ::3]):
        assert_near(layer(x), F.relu(plainly(layer, x)))
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer(last), layer(x))
    wide = whole.contiguous(memory_format=torch.channels_last)[:, 2:6, 1:14, 3:20]
    assert wide.stride(1) == 1
    assert_near(layer(wide), F.relu(plainly(layer, wide)))
    assert len(calls) == 7


@torch.no_grad()
def test_what_is_not_finite_stays_where_it_is_read():
    for name in ("image", "erfnet, second", "up"):
        layer = made(name)
        x = images(layer, (8, 10))
        x[0, 1, 3, 4], x[1, 0, 7, 9] = float("nan"), float("inf")
        expected = F.relu(plainly(layer, x))
        y = layer(x).double()
        assert torch.equal(y.isnan(), expected.isnan())
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["image", "up"])
def test_gradients_compilers_and_modes_see_torchs_operators(name, calls):
    layer = made(name)
    x = images(layer)
    expected = F.relu(plainly(layer, x)).float()
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.parameters())
    x = x.detach()
    layer.requires_grad_(False)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        for forced in ("torch", "reference"):
            with pyeff.backend(forced):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.1)
        layer.train()(x)
        layer.eval()
    assert not calls
    x = images(layer)
    assert_near(layer(x), F.relu(plainly(layer, x)))  # gradients are recorded, but of nothing
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["image", "up"])
@torch.no_grad()
def test_weights_that_change_after_a_call(name, calls):
    layer = made(name)
    x = images(layer)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        layer(x)
        if tensor.is_floating_point():
            tensor.mul_(1.25)
        assert_near(layer(x), F.relu(plainly(layer, x)))
    layer.train()(x)  # moves the statistics
    layer.eval()
    assert_near(layer(x), F.relu(plainly(layer, x)))
    assert_near(layer.to(torch.bfloat16)(x.bfloat16()), F.relu(plainly(layer, x.bfloat16())))
    with torch.inference_mode():
        assert_near(layer(x.bfloat16()), F.relu(plainly(layer, x.bfloat16())))
    assert calls


@torch.no_grad()
def test_what_does_not_fit_is_pytorchs_error(calls):
    layer, up = made("image"), made("up")
    for sampler, x in (
        (layer, torch.randn(1, 4, 8, 8)),
        (layer, torch.randn(1, 3, 8, 8).double()),
        (layer, torch.randn(1, 3, 0, 8)),
        (up, torch.randn(1, 63, 8, 8)),
    ):
        with pytest.raises(RuntimeError):
            sampler(x)
    with pytest.raises(RuntimeError):
        up(torch.randn(1, 64, 4, 4), torch.randn(1, 16, 7, 8))
    assert not calls


def test_convolutions_that_the_kernels_cannot_run():
    weight = torch.randn(4, 4, 3, 3)
    for conv in (
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, groups=2),
    ):
        assert samplers.prepare(conv, weight, None) is None
    assert samplers.prepare(nn.Conv2d(4, 4, 3), weight.to("meta"), None) is None


PROBLEM = (3, 3, 0, 1, 1, 2, 2, 1, 1, 1, 1)


def call(problem=PROBLEM, **changes):
    """The kernel on a legal call, but for what is changed."""
    weight = torch.randn(5, 3, 9, 1)
    arguments = {
        "x": torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        "weight": weight,
        "packed": samplers.pack_line(weight),
        "bias": torch.zeros(5),
        "residual": None,
        "scale": torch.ones(3),
        "shift": torch.ones(3),
        "y": torch.empty(1, 8, 4, 4, memory_format=torch.channels_last),
    }
    _C.sampler_conv2d_forward(**{**arguments, **changes}, problem=problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": PROBLEM[:-1]}, "problem must have 11 integers"),
        ({"problem": (*PROBLEM[:3], 5, *PROBLEM[4:])}, "activation must be one from 0 to 4"),
        ({"problem": (0, *PROBLEM[1:])}, "kernel_h must be at least 1"),
        ({"problem": (3, 2, *PROBLEM[2:])}, "weight must be [F, C, kernel_h * kernel_w, 1]"),
        ({"weight": torch.zeros(5, 3, 9, 1, dtype=torch.int64)}, "weight must be a floating-point"),
        ({"packed": torch.zeros(7)}, "packed must"),
        ({"bias": torch.zeros(4)}, "bias must"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias must be a floating-point tensor"),
        ({"shift": None}, "scale and shift must come together"),
        ({"x": torch.randn(1, 4, 8, 8)}, "x must have 4 dimensions and 3 channels"),
        ({"x": torch.randn(1, 3, 8, 8)}, "x must be channels_last"),
        ({"y": torch.randn(2, 8, 4, 4).permute(0, 1, 3, 2)}, "y must be channels_last"),
        ({"y": torch.randn(2, 4, 4, 8).permute(0, 3, 1, 2)}, "y must have the batch size of x"),
        ({"x": torch.randn(1, 0, 8, 3).permute(0, 3, 1, 2)}, "x must have pixels"),
        ({"y": torch.randn(1, 4, 5, 8).permute(0, 3, 1, 2)}, "pooling needs a y of half the size"),
    ],
)
def test_errors_of_the_binding(changes, message):
    call()
    with pytest.raises(ValueError, match="sampler_conv2d: .*" + re.escape(message)):
        call(**changes)
