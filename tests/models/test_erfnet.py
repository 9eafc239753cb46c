import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models.model_cases import randomise_norms

import pyeff
from pyeff.measure import measure_cost
from pyeff.models import build, erfnet

SMALL = {"classes": 5, "widths": (4, 8, 12)}


def small(**options):
    """A narrow ERFNet in float64 and eval mode, with norms that a mistake would show in."""
    return randomise_norms(erfnet(**{**SMALL, **options})).double().eval()


def images(height=16, width=24, n=1, channels=3):
    return torch.rand(n, channels, height, width, dtype=torch.float64)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_of_the_paper():
    with torch.device("meta"):
        assert count(erfnet()) == 2_064_256
        assert count(erfnet(classes=19)) == 2_064_191
        assert count(erfnet().encoder) == 1_874_044
        assert count(erfnet(order="horizontal_first")) == 2_064_256
        assert count(erfnet(encoder_only=True)) == 1_874_044 + 2_580


@pytest.mark.parametrize(
    ("size", "giga"), [((512, 1024), 26.61), ((360, 640), 11.70), ((256, 512), 6.65)]
)
def test_multiply_adds_of_the_paper(size, giga):
    cost = erfnet().costs(size)
    assert round(cost.macs / 1e9, 2) == giga
    assert cost.params == 2_064_256


def test_multiply_adds_by_layer():
    """The paper's table at 512 x 1024, a line a layer."""
    with torch.device("meta"):
        model = erfnet().eval()
    parts = [
        *((model.encoder[i], size) for i, size in _table()),
        (model.decoder[0], (128, 64, 128, 0.604)),
        (model.decoder[3], (64, 128, 256, 0.302)),
        (model.decoder[6], (16, 256, 512, 0.168)),
    ]
    for layer, (channels, height, width, giga) in parts:
        assert round(measure_cost(layer, (channels, height, width)).macs / 1e9, 3) == giga


def _table():
    yield 0, (3, 512, 1024, 0.046)
    yield 1, (16, 256, 512, 0.226)
    yield from ((i, (64, 128, 256, 1.611)) for i in range(2, 7))
    yield 7, (64, 128, 256, 0.302)
    yield from ((i, (128, 64, 128, 1.611)) for i in range(8, 16))


def test_costs_of_the_dense_network():
    dense, pairs = erfnet(dense=True).costs((64, 64)), erfnet().costs((64, 64))
    # A 3 x 3 costs one and a half times a pair of one rank.
    rest = 3 * pairs.macs - 2 * dense.macs  # what is not in blocks
    assert rest == erfnet_rest((64, 64))
    assert dense.params == 3_022_784


def erfnet_rest(size):
    """Multiply-adds of the samplers and of the last layer."""
    with torch.device("meta"):
        model = erfnet().eval()
    height, width = size
    layers = [
        (model.encoder[0], (3, height, width)),
        (model.encoder[1], (16, height // 2, width // 2)),
        (model.encoder[7], (64, height // 4, width // 4)),
        (model.decoder[0], (128, height // 8, width // 8)),
        (model.decoder[3], (64, height // 4, width // 4)),
        (model.decoder[6], (16, height // 2, width // 2)),
    ]
    return sum(measure_cost(layer, image).macs for layer, image in layers)


def test_dilations_and_dropout_of_the_paper():
    model = erfnet()
    assert [block.conv2.dilation[0] for block in model.encoder[8:]] == [2, 4, 8, 16] * 2
    assert {block.conv1.dilation for block in model.encoder[8:]} == {(1, 1)}
    assert [block.dropout.p for block in model.encoder[2:7]] == [0.03] * 5
    assert [block.dropout.p for block in model.encoder[8:]] == [0.3] * 8
    assert [model.decoder[i].dropout.p for i in (1, 2, 4, 5)] == [0.0] * 4
    pairs = [m for m in model.modules() if type(m).__name__ == "FactorizedConv2d"]
    assert len(pairs) == 34
    assert {pair.inner for pair in pairs} == {"relu"}
    assert {pair.norm for pair in pairs} == {"outer"}


@pytest.mark.parametrize("options", [{}, {"order": "horizontal_first"}, {"dense": True}], ids=str)
def test_inference_equals_its_layers_one_by_one(options):
    model, x = small(**options), images(n=2)
    y = x
    for layer in [*model.encoder, *model.decoder]:
        y = plainly(layer, y)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10, check_stride=False)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def plainly(layer, x):
    """A layer of torch modules called one after another."""
    kind = type(layer).__name__
    if kind == "Downsampler":
        return F.relu(layer.norm(torch.cat([layer.conv(x), F.max_pool2d(x, 2)], 1)))
    if kind == "Upsampler":
        return F.relu(layer.norm(layer.conv(x)))
    if kind == "NonBottleneck1d":
        y = F.relu(pair_plainly(layer.conv1, x))
        return F.relu(pair_plainly(layer.conv2, y) + x)
    return layer(x)


def pair_plainly(pair, x):
    if type(pair).__name__ == "ConvNorm2d":
        return pair.norm(pair.conv(x))
    return pair.norm_outer(pair.second(F.relu(pair.first(x))))


@pytest.mark.parametrize("size", [(17, 30), (1, 1), (8, 9), (7, 16)])
def test_any_size(size):
    model, x = small(), images(*size)
    whole = F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8))
    with torch.no_grad():
        expected = model(whole)[:, :, : size[0], : size[1]]
        y = model(x)
        assert y.shape == (1, 5, *size)
        torch.testing.assert_close(y, expected)
        small_map = small(encoder_only=True)(x)
    assert small_map.shape == (1, 5, -(-size[0] // 8), -(-size[1] // 8))


def test_grey_images_and_other_channels():
    for channels in (1, 2):
        model = small(in_channels=channels)
        with torch.no_grad():
            assert model(images(channels=channels)).shape == (1, 5, 16, 24)


def test_no_image():
    model = small()
    with torch.no_grad():
        assert model(images(n=0)).shape == (0, 5, 16, 24)
        assert small(encoder_only=True)(images(n=0)).shape == (0, 5, 2, 3)
        assert small(dense=True)(images(n=0)).shape == (0, 5, 16, 24)
    with pytest.raises(ValueError, match="ERFNet: x must hold an image in training, got none"):
        model.train()(images(n=0))


def test_every_parameter_gets_a_gradient_and_a_few_steps_learn():
    torch.manual_seed(1)
    model = erfnet(3, widths=(4, 8, 12), dropout=(0.0, 0.0))
    x, labels = torch.rand(4, 3, 16, 16), torch.randint(3, (4, 16, 16))
    labels[:, :8] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a batch norm in training moves nothing but rounding errors.
    assert not [n for n in missing if not n.endswith("bias")]
    assert losses[-1] < 0.85 * losses[0]


def test_a_trained_encoder_starts_a_whole_network():
    stage1, stage2 = small(encoder_only=True), small()
    stage2.encoder.load_state_dict(stage1.encoder.state_dict())
    assert stage1.decoder is None
    assert stage2.head is None
    x = images()
    with torch.no_grad():
        expected = stage1.head(stage1.encoder(x))
        torch.testing.assert_close(stage1(x), expected)
        torch.testing.assert_close(stage2.encoder(x), stage1.encoder(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_only": True},
        {"order": "horizontal_first", "in_channels": 1},
        {"dense": True, "dropout": (0.1, 0.2)},
    ],
    ids=str,
)
def test_is_rebuilt_from_its_configuration_and_from_a_file(options, tmp_path):
    model = small(**options).float()
    twin = build(json.loads(json.dumps(model.config))).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    pyeff.save(model, tmp_path / "erfnet.safetensors")
    loaded = pyeff.load(tmp_path / "erfnet.safetensors")
    x = images(channels=options.get("in_channels", 3)).float()
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
        assert torch.equal(model(x), loaded(x))


def test_copies_are_independent():
    model, x = small(), images()
    with torch.no_grad():
        before = model(x)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "erfnet: classes must be positive, got 0"),
        ({"in_channels": 0}, "erfnet: widths must be 3 rising ints above in_channels 0, got"),
        ({"in_channels": 16}, "erfnet: widths must be 3 rising ints above in_channels 16, got"),
        ({"widths": (16, 64)}, "erfnet: widths must be 3 rising ints above in_channels 3, got"),
        ({"widths": (16, 64, 64)}, "erfnet: widths must be 3 rising ints"),
        ({"dropout": (0.3,)}, r"erfnet: dropout must be 2 probabilities, got \[0.3\]"),
        ({"dropout": (0.3, 2.0)}, r"dropout must be in \[0, 1\], got 2.0"),
        ({"order": "rows_first"}, "order must be one of 'vertical_first', 'horizontal_first'"),
        ({"order": "rows_first", "dense": True}, "order must be one of 'vertical_first'"),
    ],
)
def test_errors_of_the_function(options, message):
    with pytest.raises(ValueError, match=message):
        erfnet(**options)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16), (1, 3, 16, 0)])
def test_errors_of_the_images(shape):
    with pytest.raises(ValueError, match=r"ERFNet: x must be \[N, 3, H, W\] with pixels, got \["):
        small()(torch.rand(shape, dtype=torch.float64))


def test_errors_of_costs():
    with pytest.raises(ValueError, match=r"costs: input_size must be positive, got \(0, 8\)"):
        small().costs((0, 8))
