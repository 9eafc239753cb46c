"""NestedNet's three strategies."""

import json

import pytest
import torch
from models.model_cases import images, randomise_norms

from pyeff.models import build, build_backbone, dvn, load_backbone, nestednet

WIDTHS = [8, 16, 32]
STRATEGIES = ("channel", "layer", "weight")


def small(strategy, classes=5, levels=3, **options):
    model = nestednet("resnet20", classes, levels, strategy, widths=WIDTHS, **options)
    model.step(1.0)
    return randomise_norms(model).double().eval()


def test_channel_scheduling_is_a_dvn_with_one_task():
    ours = small("channel")
    theirs = dvn("resnet20", {"main": 5}, 3, widths=WIDTHS).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = images()
    for level in (1, 2, 3):
        assert torch.equal(ours(x, level=level), theirs(x, level=level))
        assert ours.activate(None, level) == theirs.activate(None, level)
    assert ours.costs() == theirs.costs()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_level_equals_the_plain_backbone(strategy):
    model = small(strategy)
    plain = randomise_norms(build_backbone("resnet20", 5, widths=WIDTHS)).double().eval()
    load_backbone(model, plain)
    x = images()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_materialised_level_equals_the_nested_forward(strategy):
    model = small(strategy, level_heads=True)
    x = images()
    outs = []
    for level in (1, 2, 3):
        outs.append(model(x, level=level))
        plain = model.materialise(level=level)
        torch.testing.assert_close(plain(x), outs[-1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[1], outs[2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_round_trip_with_masks_and_config(strategy):
    model = small(strategy, [3, 5, 5])
    other = build(json.loads(json.dumps(model.config))).double().eval()
    other.load_state_dict(model.state_dict())
    x = images()
    for level in (1, 2, 3):
        assert torch.equal(model(x, level=level), other(x, level=level))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_coarse_classes_at_the_core_fine_ones_at_the_full_level(strategy):
    model = small(strategy, [3, 5, 7])
    x = images()
    assert [model(x, level=level).shape[1] for level in (1, 2, 3)] == [3, 5, 7]
    assert [model.classes(level=level) for level in (1, 2, 3)] == [3, 5, 7]
    assert model.tasks == {"main": 7}
    mixed = model(x, level=torch.tensor([3, 1, 2]))
    assert mixed.isinf().sum(1).tolist() == [0, 4, 2]
    torch.testing.assert_close(mixed[1, :3], model(x[1:2], level=1)[0])
    for level in (1, 2, 3):
        torch.testing.assert_close(model.materialise(level=level)(x), model(x, level=level))


def test_layer_levels_add_blocks_and_keep_transitions():
    model = small("layer")
    assert model.options.block_levels == [1, 2, 3, 1, 1, 3, 1, 2, 3]
    at = [set(model.blocks_at(level)) for level in (1, 2, 3)]
    assert at[0] < at[1] < at[2]
    assert {3, 6} <= at[0]
    assert len(model.materialise(level=1).blocks) == len(at[0])


def test_skipped_blocks_get_no_gradient():
    model = small("layer").train()
    model(images(), level=1).sum().backward()
    for index, block in enumerate(model.blocks):
        runs = index in model.blocks_at(1)
        assert all((p.grad is not None) is runs for p in block.parameters())


def test_given_block_levels():
    levels = [3, 2, 1, 1, 1, 1, 1, 3, 3]
    assert small("layer", block_levels=levels).blocks_at(1) == [2, 3, 4, 5, 6]


def test_masks_shrink_step_by_step_and_stay_nested():
    model = nestednet("resnet8", 5, 3, "weight", widths=WIDTHS, densities=[0.2, 0.5, 0.9])
    conv = model.blocks[1].conv2
    total = conv.weight.numel()
    shares = []
    for progress in (0.0, 0.3, 0.7, 1.0, 2.0):
        model.step(progress)
        masks = [conv.mask(level) for level in (1, 2, 3)]
        assert (masks[0] <= masks[1]).all()
        assert (masks[1] <= masks[2]).all()
        shares.append([int(mask.sum()) for mask in masks])
    assert shares[0] == [total] * 3
    assert shares[-1] == [round(total * share) for share in (0.2, 0.5, 0.9)] == shares[-2]
    assert all(a >= b for a, b in zip(shares[1], shares[2], strict=True))
    assert shares[1][0] == round(total * (0.2 + 0.8 * 0.7**3))


def test_a_level_trains_only_its_weights():
    model = small("weight").train()
    model(images(8), level=1).square().sum().backward()
    for block in model.blocks:
        for name in block.conv_grids:
            conv = getattr(block, name)
            assert (conv.weight.grad[~conv.mask(1)] == 0).all()


def test_one_task_may_go_unnamed_or_be_named():
    model = small("channel", task="digits")
    x = images()
    assert torch.equal(model(x, "digits", 2), model(x, level=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "depth"}, "strategy must be one of .* got 'depth'"),
        ({"levels": 0}, "levels must be positive, got 0"),
        ({"classes": [2, 3]}, "task 'main' must have a positive number of classes for each of 3"),
        ({"classes": [2, 3, 3], "level_heads": False}, "level_heads must not be False"),
        ({"densities": [0.1, 0.2, 0.3]}, "densities must go with strategy 'weight'"),
        ({"strategy": "weight", "densities": [0.5, 1.0]}, "densities must be 3 rising shares"),
        ({"strategy": "weight", "densities": [0.5, 0.4, 1.0]}, "densities must be 3 rising shares"),
        ({"block_levels": [1] * 9}, "block_levels must go with strategy 'layer', got 'channel'"),
        ({"strategy": "layer", "block_levels": [1]}, r"must be 9 levels in 1\.\.3, got \[1\]"),
        (
            {"strategy": "layer", "block_levels": [1, 2, 3, 2, 1, 1, 1, 1, 1]},
            "must be 1 for the bl",
        ),
        ({"strategy": "layer", "block_levels": [1, 3, 3, 1, 1, 1, 1, 1, 1]}, r"none at \[2\]"),
        ({"strategy": "layer", "backbone": "resnet8"}, "levels must be at most 2 for 1 blocks"),
    ],
)
def test_constructor_errors(arguments, message):
    arguments = {"backbone": "resnet20", "classes": 5, "levels": 3, **arguments}
    with pytest.raises(ValueError, match=message):
        nestednet(**arguments)


def test_step_errors():
    with pytest.raises(ValueError, match="progress must be at least 0, got -1"):
        small("weight").step(-1)
