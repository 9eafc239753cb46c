"""Checkpoints of the public ERFNet's layout: names and shapes from its layer table, values random.

The network that they belong to is written here once more, in functions of torch alone.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.models import DroppedParametersWarning, erfnet, load_public_state_dict

CLASSES = 6
DILATIONS = (2, 4, 8, 16, 2, 4, 8, 16)
HEAD = ("encoder.output_conv.weight", "encoder.output_conv.bias")


def checkpoint(prefix="module.", widths=(4, 8, 12), counted=True, in_channels=3):
    """A state dict of the public layout, for channels of one's own choice."""
    half, quarter, eighth = widths
    state = {}

    def add(name, *shape):
        state[f"{prefix}{name}"] = 0.3 * torch.randn(*shape, dtype=torch.float64)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{part}", channels)
        state[f"{prefix}{name}.running_var"].abs_().add_(0.5)
        state[f"{prefix}{name}.weight"].add_(1)
        if counted:
            state[f"{prefix}{name}.num_batches_tracked"] = torch.tensor(7)

    def down(name, inputs, outputs):
        add(f"{name}.conv.weight", outputs - inputs, inputs, 3, 3)
        add(f"{name}.conv.bias", outputs - inputs)
        norm(f"{name}.bn", outputs)

    def block(name, channels):
        for number in (1, 2):
            add(f"{name}.conv3x1_{number}.weight", channels, channels, 3, 1)
            add(f"{name}.conv3x1_{number}.bias", channels)
            add(f"{name}.conv1x3_{number}.weight", channels, channels, 1, 3)
            add(f"{name}.conv1x3_{number}.bias", channels)
            norm(f"{name}.bn{number}", channels)

    def up(name, inputs, outputs):
        add(f"{name}.conv.weight", inputs, outputs, 3, 3)
        add(f"{name}.conv.bias", outputs)
        norm(f"{name}.bn", outputs)

    down("encoder.initial_block", in_channels, half)
    down("encoder.layers.0", half, quarter)
    for i in range(1, 6):
        block(f"encoder.layers.{i}", quarter)
    down("encoder.layers.6", quarter, eighth)
    for i in range(7, 15):
        block(f"encoder.layers.{i}", eighth)
    add("encoder.output_conv.weight", CLASSES, eighth, 1, 1)
    add("encoder.output_conv.bias", CLASSES)
    up("decoder.layers.0", eighth, quarter)
    block("decoder.layers.1", quarter)
    block("decoder.layers.2", quarter)
    up("decoder.layers.3", quarter, half)
    block("decoder.layers.4", half)
    block("decoder.layers.5", half)
    add("decoder.output_conv.weight", half, CLASSES, 2, 2)
    add("decoder.output_conv.bias", CLASSES)
    return state


class Public:
    """The network of a checkpoint, in eval mode."""

    def __init__(self, state, vertical_first=True):
        self.state = {name.removeprefix("module."): value for name, value in state.items()}
        self.vertical_first = vertical_first

    def of(self, name, *parts):
        return [self.state[f"{name}.{part}"] for part in parts]

    def norm(self, name, x):
        mean, variance, weight, bias = self.of(
            name, "running_mean", "running_var", "weight", "bias"
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    def down(self, name, x):
        convolved = F.conv2d(x, *self.of(f"{name}.conv", "weight", "bias"), 2, 1)
        return F.relu(self.norm(f"{name}.bn", torch.cat([convolved, F.max_pool2d(x, 2)], 1)))

    def up(self, name, x):
        y = F.conv_transpose2d(x, *self.of(f"{name}.conv", "weight", "bias"), 2, 1, 1)
        return F.relu(self.norm(f"{name}.bn", y))

    def pair(self, name, number, x, dilation):
        def vertical(y):
            weights = self.of(f"{name}.conv3x1_{number}", "weight", "bias")
            return F.conv2d(y, *weights, 1, (dilation, 0), (dilation, 1))

        def horizontal(y):
            weights = self.of(f"{name}.conv1x3_{number}", "weight", "bias")
            return F.conv2d(y, *weights, 1, (0, dilation), (1, dilation))

        first, second = (vertical, horizontal)[:: 1 if self.vertical_first else -1]
        return self.norm(f"{name}.bn{number}", second(F.relu(first(x))))

    def block(self, name, x, dilation=1):
        y = F.relu(self.pair(name, 1, x, 1))
        return F.relu(self.pair(name, 2, y, dilation) + x)

    def encoder(self, x):
        x = self.down("encoder.layers.0", self.down("encoder.initial_block", x))
        for i in range(1, 6):
            x = self.block(f"encoder.layers.{i}", x)
        x = self.down("encoder.layers.6", x)
        for i, dilation in enumerate(DILATIONS, 7):
            x = self.block(f"encoder.layers.{i}", x, dilation)
        return x

    def head(self, x):
        return F.conv2d(self.encoder(x), *self.of("encoder.output_conv", "weight", "bias"))

    def __call__(self, x):
        x = self.up("decoder.layers.0", self.encoder(x))
        x = self.block("decoder.layers.2", self.block("decoder.layers.1", x))
        x = self.up("decoder.layers.3", x)
        x = self.block("decoder.layers.5", self.block("decoder.layers.4", x))
        return F.conv_transpose2d(x, *self.of("decoder.output_conv", "weight", "bias"), 2)


def model_of(**options):
    return erfnet(CLASSES, **{"widths": (4, 8, 12), **options}).double().eval()


def images(channels=3):
    return torch.rand(1, channels, 16, 24, dtype=torch.float64)


@pytest.mark.parametrize("order", ["vertical_first", "horizontal_first"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_loaded_network_is_the_checkpoints_network(order, prefix):
    state, x = checkpoint(prefix), images()
    model = model_of(order=order)
    with pytest.warns(DroppedParametersWarning, match=r"dropped encoder\.output_conv\.weight, enc"):
        assert load_public_state_dict(model, state) is model
    with torch.no_grad():
        expected = Public(state, order == "vertical_first")(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10, check_stride=False)
        other = Public(state, order != "vertical_first")(x)
        assert not torch.allclose(other, expected)
    assert model.encoder[0].norm.num_batches_tracked == 7


def test_the_papers_widths_and_shapes():
    state = checkpoint(widths=(16, 64, 128))
    assert sum(v.numel() for n, v in state.items() if "running" not in n and "num_" not in n) == (
        sum(p.numel() for p in erfnet(CLASSES).parameters()) + 128 * CLASSES + CLASSES
    )
    model = erfnet(CLASSES).double().eval()
    with pytest.warns(DroppedParametersWarning):
        load_public_state_dict(model, state)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), Public(state)(x), rtol=1e-9, atol=1e-9, check_stride=False
        )


def test_an_encoder_takes_its_head_and_drops_a_decoder():
    state, x = checkpoint(), images()
    model = model_of(encoder_only=True)
    with pytest.warns(DroppedParametersWarning, match=r"dropped decoder\.layers\.0.* \.\.\.: the"):
        load_public_state_dict(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), Public(state).head(x), check_stride=False)
    stage1 = {name: value for name, value in state.items() if "decoder" not in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_public_state_dict(model_of(encoder_only=True), stage1)


def test_a_whole_network_without_the_head_gives_no_notice():
    state = {n: v for n, v in checkpoint("").items() if n not in HEAD}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_public_state_dict(model_of(), state)


def test_old_checkpoints_do_not_count_batches():
    state, model, x = checkpoint(counted=False), model_of().train(), images()
    model(x)  # counts one
    with pytest.warns(DroppedParametersWarning):
        load_public_state_dict(model, state)
    assert model.encoder[0].norm.num_batches_tracked == 0
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), Public(state)(x), check_stride=False)


def test_grey_images():
    state, x = checkpoint(in_channels=1), images(1)
    model = model_of(in_channels=1)
    with pytest.warns(DroppedParametersWarning):
        load_public_state_dict(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), Public(state)(x), check_stride=False)


def without(name):
    return {n: v for n, v in checkpoint("").items() if n != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            without("encoder.layers.3.conv1x3_2.bias"),
            r"got: missing encoder\.layers\.3\.conv1x3_2\.bias$",
        ),
        (
            {**checkpoint(""), "decoder.layers.6.bn.weight": torch.zeros(1)},
            r"got: unknown decoder\.layers\.6\.bn\.weight$",
        ),
        (
            {**checkpoint(""), "decoder.output_conv.bias": torch.zeros(20)},
            r"got: decoder\.output_conv\.bias is \[20\], the model has \[6\]$",
        ),
        (
            {"state_dict": {}, "epoch": torch.zeros(1)},
            "got: unknown state_dict; unknown epoch; missing enc",
        ),
        ({}, "got: missing encoder.initial_block.conv.weight;"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(state, message):
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"load_public_state_dict: state must hold the tensors .*{message}"
    ):
        load_public_state_dict(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="load_public_state_dict: model must be an ERFNet, got Lin"):
        load_public_state_dict(nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match="load_public_state_dict: model must be made of pairs"):
        load_public_state_dict(model_of(dense=True), checkpoint())
