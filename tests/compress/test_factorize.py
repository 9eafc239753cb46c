import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pyeff import models
from pyeff.compress import RankRule, factorize, factorize_with_report
from pyeff.measure.cost import measure_cost
from pyeff.nn import ConvNorm2d, Downsampler, FactorizedConv2d

TIMING = importlib.import_module("pyeff.compress.factorize_time")


def randomised(model, seed=0):
    """Weights, biases and statistics of norms that are not their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.double().eval()


def of_rank(rank, *shape, seed=0):
    """A weight whose channel matrix has a rank."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return (left @ right).reshape(shape)


LAYERS = {
    "3x1": lambda: (nn.Conv2d(6, 8, (3, 1), padding=(1, 0)), (2, 6, 9, 7)),
    "1x3 strided": lambda: (nn.Conv2d(6, 8, (1, 3), (1, 2), (0, 1)), (2, 6, 9, 7)),
    "1x1 no bias": lambda: (nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 5)),
    "3x3 strided dilated": lambda: (nn.Conv2d(6, 8, 3, 2, 3, 2), (2, 6, 13, 11)),
    "5x3 uneven stride": lambda: (nn.Conv2d(6, 8, (5, 3), (1, 2), (2, 0)), (2, 6, 9, 8)),
    "3x3 same": lambda: (nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 9, 8)),
    "3x3 reflect": lambda: (nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 8)),
    "3x3 circular": lambda: (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 8)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (2, 6, 5, 4)),
    "transposed 1-D": lambda: (
        nn.ConvTranspose2d(6, 8, (3, 1), (2, 1), (1, 0), dilation=(2, 1)),
        (2, 6, 5, 4),
    ),
    "linear": lambda: (nn.Linear(10, 7), (3, 10)),
    "linear no bias": lambda: (nn.Linear(10, 7, bias=False), (2, 4, 10)),
}


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_computes_what_the_layer_did(name, form):
    layer, shape = LAYERS[name]()
    layer = randomised(layer)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    # Never cheaper at full rank: only "always" puts the pair there.
    pair = factorize(layer, energy=1.0, form=form, only_if="always")
    assert isinstance(pair, nn.Sequential)
    assert len(pair) == 2
    assert pair[0].bias is None
    assert (pair[1].bias is None) == (layer.bias is None)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-12)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_spatial_form_is_a_column_then_a_row():
    layer = nn.Conv2d(6, 8, 3, 2, 1)
    pair = factorize(layer, rank=4, form="spatial", only_if="always")
    assert [tuple(p.weight.shape) for p in pair] == [(4, 6, 3, 1), (8, 4, 1, 3)]
    assert (pair[0].stride, pair[1].stride) == ((2, 1), (1, 2))
    assert (pair[0].padding, pair[1].padding) == ((1, 0), (0, 1))


def test_the_pair_is_the_best_approximation_and_balanced():
    layer = randomised(nn.Conv2d(6, 8, (3, 1)))
    model, report = factorize_with_report(layer, RankRule(rank=3), only_if="always")
    weight = (model[1].weight.flatten(1) @ model[0].weight.flatten(1)).reshape(layer.weight.shape)
    values = torch.linalg.svdvals(layer.weight.flatten(1))
    expected = values[3:].norm() / values.norm()
    found = (weight - layer.weight).norm() / layer.weight.norm()
    torch.testing.assert_close(found, expected)
    (line,) = report.layers
    assert line.error == pytest.approx(expected.item(), rel=1e-10)
    assert line.values == pytest.approx(values.tolist(), rel=1e-10)
    norms = [p.weight.flatten(1).norm() for p in model]
    torch.testing.assert_close(norms[0], norms[1])


def test_energy_is_of_the_sum_of_singular_values():
    diagonal = torch.tensor([6.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(diagonal.diag())
    ranks = []
    # Of the squares 36 of 46, 78 %, are in the first value alone.
    for energy in (0.5, 0.6, 0.61, 0.9, 0.91, 1.0):
        _, report = factorize_with_report(layer, RankRule(energy=energy), only_if="always")
        ranks.append(report.layers[0].rank)
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert "0.9 of the sum of the singular values" in str(RankRule(energy=0.9))


def test_rank_never_falls_with_the_energy():
    layer = randomised(nn.Conv2d(12, 16, (3, 1)))
    ranks = [
        factorize_with_report(layer, RankRule(energy=e / 20), only_if="always")[1].layers[0].rank
        for e in range(1, 21)
    ]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == 16


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.6])
def test_max_error_is_kept_and_no_rank_less_would_do(limit):
    layer = randomised(nn.Linear(20, 30))
    _, report = factorize_with_report(layer, RankRule(max_error=limit), only_if="always")
    line = report.layers[0]
    values = torch.tensor(line.values)
    assert line.error <= limit + 1e-12
    if limit:
        one_less = values[line.rank - 1 :].norm() / values.norm()
        assert float(one_less) > limit
    else:
        assert line.rank == 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numerical_rank_is_found(dtype):
    layer = nn.Conv2d(20, 30, (3, 1)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(of_rank(5, 30, 20, 3, 1))
    small, report = factorize_with_report(layer, RankRule(energy=1.0))
    assert report.layers[0].rank == 5
    x = torch.randn(2, 20, 6, 6, dtype=dtype)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(small(x), layer(x), rtol=tolerance, atol=tolerance)


def test_only_cheaper_pairs_are_taken_and_the_network_never_grows():
    # Break-even of 16 -> 24, 3 x 1: r < 24 * 48 / (24 + 48) = 16.
    layer = nn.Conv2d(16, 24, (3, 1), padding=(1, 0), bias=False)
    example = torch.randn(1, 16, 8, 8)
    for rank, factored in ((15, True), (16, False), (17, False)):
        small, report = factorize_with_report(layer, RankRule(rank=rank), example=example)
        line = report.layers[0]
        assert line.factored is factored
        assert (line.macs, line.macs_after) == (24 * 48 * 64, rank * (24 + 48) * 64)
        assert isinstance(small, nn.Sequential) is factored
        if not factored:
            assert "multiply-adds, the layer has" in line.left
    model = nn.Sequential(*(make()[0] for name, make in LAYERS.items() if "linear" not in name))
    size = sum(p.numel() for p in model.parameters())
    for energy in (0.3, 0.6, 0.9, 1.0):
        small = factorize(model, energy=energy)
        assert sum(p.numel() for p in small.parameters()) <= size


def test_auto_takes_the_cheaper_form():
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(of_rank(2, 32, 32, 3, 3))
    _, report = factorize_with_report(layer, RankRule(energy=1.0))
    assert (report.layers[0].form, report.layers[0].rank) == ("channel", 2)
    with torch.no_grad():
        column, row = torch.randn(1, 32, 3, 1), torch.randn(32, 1, 1, 3)
        layer.weight.copy_(column * row)
    _, report = factorize_with_report(layer, RankRule(energy=1.0))
    # This one has rank 1 in the spatial matrix, and 32 x 3 numbers more in the channel one.
    assert (report.layers[0].form, report.layers[0].rank) == ("spatial", 1)


def test_measured_time_decides_where_it_is_asked_for(monkeypatch):
    layer = nn.Linear(64, 64)
    example = torch.randn(8, 64)
    for times, factored in (([2.0, 1.0], True), ([1.0, 2.0], False)):
        monkeypatch.setattr(TIMING, "measure_latency", lambda layers, x, t=times: t)
        _, report = factorize_with_report(layer, RankRule(rank=4), only_if="both", example=example)
        line = report.layers[0]
        assert (line.seconds, line.seconds_after) == tuple(times)
        assert line.factored is factored
    assert "the pair took 2000.000 ms, the layer 1000.000 ms" in line.left
    # By time alone, a pair of more multiply-adds may stand.
    monkeypatch.setattr(TIMING, "measure_latency", lambda layers, x: [2.0, 1.0])
    _, report = factorize_with_report(layer, RankRule(rank=60), only_if="time", example=example)
    assert report.layers[0].factored


@pytest.mark.parametrize(
    ("times", "factored"),
    [
        # Of the pair as it is; with the first member factored, the second, both.
        ([1.0, 2.0, 3.0, 4.0], set()),
        ([4.0, 2.0, 5.0, 3.0], {"0.first"}),
        ([4.0, 5.0, 5.0, 3.0], {"0.first", "0.second"}),
    ],
)
def test_members_are_measured_in_the_call_that_runs_them(monkeypatch, times, factored):
    layer = nn.Sequential(FactorizedConv2d(8, 12, 3, padding=1, norm="both")).eval()
    seen = []

    def measure(layers, x):
        seen.append([layer.is_whole for layer in layers])
        assert x.shape == (2, 8, 6, 5)
        return times

    monkeypatch.setattr(TIMING, "measure_latency", measure)
    _, report = factorize_with_report(
        layer, RankRule(rank=2), only_if="both", example=torch.randn(2, 8, 6, 5)
    )
    assert seen == [[True, False, False, False]]
    assert set(report.factored) == factored
    for line in report.layers:
        if line.factored:
            assert (line.seconds, line.seconds_after) == (times[0], min(times))
        else:
            assert "0 took " in line.left
            assert line.seconds == min(times) < line.seconds_after


def test_time_is_really_measured():
    layer = nn.Linear(512, 512)
    _, report = factorize_with_report(
        layer, RankRule(rank=2), only_if="both", example=torch.randn(256, 512)
    )
    line = report.layers[0]
    assert line.factored
    assert 0 < line.seconds_after < line.seconds


class Reader(nn.Module):
    """Reads the weight of one layer, calls another one twice, and never runs the third."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.called

    def forward(self, x):
        return self.again(self.called(x @ self.read.weight.T))


def test_layers_that_no_pair_can_stand_in_for_are_left_with_the_reason():
    model = nn.Module()
    model.grouped = nn.Conv2d(8, 8, 3, groups=4)
    model.volume = nn.Conv3d(2, 2, 3)
    model.normed = parametrizations.weight_norm(nn.Linear(8, 8))
    model.hooked = nn.Linear(8, 8)
    model.hooked.register_forward_hook(lambda *_: None)
    model.first, model.second = nn.Linear(8, 8), nn.Linear(8, 8)
    model.second.weight = model.first.weight
    model.zero = nn.Linear(8, 8)
    nn.init.zeros_(model.zero.weight)
    model.good = nn.Linear(8, 8)
    _, report = factorize_with_report(model, RankRule(rank=1))
    reasons = {line.name: line.left for line in report.layers}
    assert reasons.pop("good") is None
    expected = {
        "grouped": "grouped (4)",
        "volume": "a Conv3d is none of",
        "normed": "is none of Conv2d",
        "hooked": "it has hooks",
        "first": "another layer has the same weight",
        "second": "another layer has the same weight",
        "zero": "all its weights are zero",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])
    assert "grouped: left: grouped (4)" in str(report)


def test_example_shows_which_layers_are_called():
    model = randomised(Reader())
    example = torch.randn(2, 8, dtype=torch.float64)
    small, report = factorize_with_report(model, RankRule(rank=2), example=example)
    left = {line.name: line.left for line in report.layers}
    assert "its parent reads its weights" in left["read"]
    assert "does not run it" in left["idle"]
    assert left["called"] is None
    assert small.again is small.called
    assert report.layers[1].macs == 2 * 64
    assert report.difference > 0


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(6, 8, 3), (6, 9, 8)), (nn.Linear(10, 7), (10,))]
)
def test_an_example_without_a_batch(layer, shape):
    x = torch.randn(shape)
    _, one = factorize_with_report(layer, RankRule(rank=2), example=x)
    _, batch = factorize_with_report(layer, RankRule(rank=2), example=x[None])
    assert one.layers[0].macs == batch.layers[0].macs > 0
    assert one.layers[0].macs_after == batch.layers[0].macs_after


def test_named_layers_and_named_ranks():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    small = factorize(model, rank=2, layers=["2"])
    assert isinstance(small[0], nn.Linear)
    assert isinstance(small[2], nn.Sequential)
    small, report = factorize_with_report(model, RankRule(rank={"0": 3}))
    assert small[0][0].out_features == 3
    assert isinstance(small[2], nn.Linear)
    assert "names no rank" in report.layers[1].left


@pytest.mark.parametrize("norm", [None, "inner", "outer", "both"])
def test_members_of_a_pair_are_factored_in_training_and_eval(norm):
    layer = FactorizedConv2d(8, 12, 3, padding=1, norm=norm)
    layer = randomised(nn.Sequential(layer))
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    small, report = factorize_with_report(layer, RankRule(energy=1.0), only_if="always", example=x)
    assert report.factored == ("0.first", "0.second")
    assert report.layers[0].macs == 12 * 8 * 3 * 30
    assert report.difference < 1e-12
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-11)
    layer.train(), small.train()
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNorm2d(nn.Conv2d(8, 12, 3, padding=1)),
        lambda: ConvNorm2d(nn.ConvTranspose2d(8, 12, 3, 2, 1, 1)),
        lambda: Downsampler(8, 20),
    ],
    ids=["conv", "transposed", "downsampler"],
)
def test_layers_that_fold_their_norm_call_a_factored_member(make):
    model = randomised(nn.Sequential(make()))
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    _, report = factorize_with_report(model, RankRule(energy=1.0), only_if="always", example=x)
    assert report.factored == ("0.conv",)
    assert report.difference < 1e-12


def test_costs_of_a_factored_network_are_counted():
    torch.manual_seed(0)
    model = models.decomposeme(10, width=(8, 8, 16, 16, 32, 32, 32, 32), pools=(1, 2)).eval()
    x = torch.randn(1, 3, 16, 16)
    small, report = factorize_with_report(model, RankRule(energy=0.5), form="channel", example=x)
    assert report.factored
    saved = sum(line.macs - line.macs_after for line in report.layers if line.factored)
    before, after = (
        measure_cost(copy.deepcopy(m).to("meta").eval(), (3, 16, 16)) for m in (model, small)
    )
    assert before.macs - after.macs == saved > 0
    assert after.params == sum(p.numel() for p in small.parameters()) < before.params
    small.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_transformer_layers_that_read_weights_are_left():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    _, report = factorize_with_report(model, RankRule(rank=2), example=torch.randn(2, 5, 16))
    assert not [n for n in report.factored if "out_proj" in n]


def test_mode_gradients_and_format_are_kept():
    layer = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    layer.requires_grad_(False)
    pair = factorize(nn.Sequential(layer).eval(), rank=2)
    assert not any(module.training for module in pair.modules())
    assert not any(p.requires_grad for p in pair.parameters())
    assert pair[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    half = factorize(nn.Linear(8, 8).to(torch.bfloat16), rank=2)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "must be given one at a time, got none"),
        ({"energy": 0.5, "rank": 2}, ValueError, "one at a time, got energy and rank"),
        ({"energy": 0.0}, ValueError, r"energy must be in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, ValueError, r"energy must be in \(0, 1\], got 1.5"),
        ({"energy": float("nan")}, ValueError, "energy must be"),
        ({"max_error": 1.0}, ValueError, r"max_error must be in \[0, 1\), got 1.0"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": {"0": 0}}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be a whole number, got 1.5"),
        ({"rank": 1, "form": "tucker"}, ValueError, "form must be one of .*, got 'tucker'"),
        ({"rank": 1, "only_if": "smaller"}, ValueError, "only_if must be one of .*'smaller'"),
        ({"rank": 1, "only_if": "time"}, ValueError, "example must be given where time"),
        ({"rank": 1, "layers": ["1"]}, ValueError, r"layers of the model, got \['1'\]"),
        ({"rank": {"head": 1}}, ValueError, r"layers of the model, got \['head'\]"),
        ({"rank": 1, "layers": "0"}, TypeError, "layers must be several names, got the text '0'"),
    ],
)
def test_bad_arguments(options, error, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"factorize: .*{message}"):
        factorize(model, **options)
    assert isinstance(model[0], nn.Linear)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_no_module():
    with pytest.raises(TypeError, match=r"factorize: model must be an nn\.Module, got Tensor"):
        factorize(torch.zeros(2, 2), rank=1)
