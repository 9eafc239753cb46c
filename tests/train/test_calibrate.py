import pytest
import torch
from train.tiny import MODEL

from pyeff.models import build
from pyeff.train import calibrate


def network(**changes):
    torch.manual_seed(0)
    return build({**MODEL, "tasks": {"a": 3, "b": 2}, "in_channels": 1, **changes}).double()


def images(n):
    return [torch.randn(8, 1, 8, 8, dtype=torch.float64) * (i + 1) for i in range(n)]


def first_norm(model):
    return model.blocks[0].norm1


def test_statistics_are_the_plain_average_over_the_batches():
    model = network().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batches = images(3)
    calibrate(model, {"a": batches, "b": batches[:1]})
    norm = first_norm(model)
    weight = model.stems[0].conv.weight
    for level, channels in ((1, 2), (2, 4)):
        maps = [torch.nn.functional.conv2d(x, weight[:channels], padding=1) for x in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
        torch.testing.assert_close(norm.running_mean[0, level - 1, :channels], mean)
        torch.testing.assert_close(norm.running_var[0, level - 1, :channels], var)
    assert not model.training
    assert norm.momentum == 0.1
    assert not any(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_calibrating_twice_changes_nothing():
    model, batches = network(), images(2)
    calibrate(model, {"a": batches, "b": batches})
    first = {n: b.clone() for n, b in model.named_buffers()}
    calibrate(model, {"a": batches, "b": batches})
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, first[name]), name


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="statistics='private'"):
        calibrate(network(norm_statistics="shared"), {"a": images(1)})
    with pytest.raises(ValueError, match="got none for 'a'"):
        calibrate(network(), {"a": []})
