"""NestedBatchNorm2d: rows of statistics per (task, level), as nn.BatchNorm2d keeps one."""

import pytest
import torch
from torch import nn

from pyeff.nn import NestedBatchNorm2d


def test_one_task_one_level_is_batch_norm():
    ours, theirs = NestedBatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    for _ in range(3):
        x = torch.randn(4, 6, 3, 5, dtype=torch.float64) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean[0, 0], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[0, 0], theirs.running_var)
    assert int(ours.num_batches_tracked[0, 0]) == 3
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_only_the_active_row_and_channels_change():
    norm = NestedBatchNorm2d(8, tasks=2, levels=3)
    norm(torch.randn(4, 4, 3, 3) + 5, task=1, level=2, channel_range=(2, 6))
    changed = torch.zeros(2, 3, 8, dtype=torch.bool)
    changed[1, 1, 2:6] = True
    assert ((norm.running_mean != 0) == changed).all()
    assert ((norm.running_var != 1) == changed).all()
    assert norm.num_batches_tracked.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("affine", "rows"), [("private", (2, 3)), ("task", (2, 1)), ("shared", (1, 1))]
)
def test_affine_sharing_and_its_gradient(affine, rows):
    norm = NestedBatchNorm2d(8, 2, 3, affine=affine)
    assert norm.weight.shape == (*rows, 8)
    norm(torch.randn(4, 4, 3, 3), 1, 2, (2, 6)).square().sum().backward()
    row = (1 if rows[0] > 1 else 0, 1 if rows[1] > 1 else 0)
    inside = torch.zeros_like(norm.weight, dtype=torch.bool)
    inside[row[0], row[1], 2:6] = True
    assert (norm.weight.grad[~inside] == 0).all()
    assert (norm.weight.grad[inside] != 0).all()


def test_without_affine_there_are_no_parameters():
    norm = NestedBatchNorm2d(4, affine="none")
    assert list(norm.parameters()) == []
    torch.testing.assert_close(norm(torch.randn(9, 4, 2, 2)).mean((0, 2, 3)), torch.zeros(4))


def test_shared_statistics_mix_levels_and_private_ones_do_not():
    torch.manual_seed(0)
    wide, narrow = torch.randn(64, 4, 4, 4) * 3 + 2, torch.randn(64, 4, 4, 4) * 0.5 - 1
    for statistics, exact in (("private", True), ("shared", False)):
        norm = NestedBatchNorm2d(4, levels=2, statistics=statistics)
        for _ in range(60):
            norm(narrow, level=1)
            norm(wide, level=2)
        norm.eval()
        means = norm(narrow, level=1).mean(), norm(wide, level=2).mean()
        assert (max(abs(m.item()) for m in means) < 0.02) is exact


def test_cumulative_average_is_the_mean_over_batches():
    norm = NestedBatchNorm2d(3, levels=2, momentum=None)
    batches = [torch.randn(5, 3, 2, 2) for _ in range(4)]
    norm(torch.randn(5, 3, 2, 2), level=2)
    norm.reset_running_stats()
    assert norm.running_mean.abs().sum() == 0
    assert int(norm.num_batches_tracked.sum()) == 0
    for x in batches:
        norm(x, level=2)
    expected = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean[0, 1], expected)


def test_channels_last_and_bfloat16():
    norm = NestedBatchNorm2d(8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_state_dict_round_trip():
    norm = NestedBatchNorm2d(4, 2, 3, affine="private")
    norm(torch.randn(4, 4, 3, 3), 1, 3)
    other = NestedBatchNorm2d(4, 2, 3, affine="private")
    other.load_state_dict(norm.state_dict())
    x = torch.randn(4, 4, 3, 3)
    assert torch.equal(norm.eval()(x, 1, 3), other.eval()(x, 1, 3))
    assert norm.state_dict()["running_mean"].shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"task": 2}, "task must be in 0..1, got 2"),
        ({"task": -1}, "task must be in 0..1, got -1"),
        ({"level": 0}, "level must be in 1..3, got 0"),
        ({"level": 4}, "level must be in 1..3, got 4"),
        ({"channel_range": (0, 4)}, r"channel_range \(0, 4\) within 8, got 8 channels"),
        ({"channel_range": (4, 12)}, r"channel_range \(4, 12\) within 8, got 8 channels"),
    ],
)
def test_call_errors(call, message):
    with pytest.raises(ValueError, match=message):
        NestedBatchNorm2d(8, 2, 3)(torch.randn(2, 8, 3, 3), **call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"affine": "all"}, "affine must be one of"),
        ({"statistics": "none"}, "statistics must be one of"),
        ({"levels": 0}, "must be positive, got 4, 1 and 0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        NestedBatchNorm2d(4, **arguments)


def test_shared_statistics_have_no_cumulative_average():
    norm = NestedBatchNorm2d(4, levels=2, statistics="shared", momentum=None)
    with pytest.raises(ValueError, match="momentum=None must go with statistics='private'"):
        norm(torch.randn(2, 4, 3, 3))
