"""What the script of docs/results' ExpandNets trains and how it counts."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "models")]
script = importlib.import_module("expandnets_cifar")


def plan(tmp_path, **changes):
    arguments = {
        "task": "cifar10",
        "data": tmp_path / "data",
        "runs": tmp_path,
        "kernel": 7,
        "rate": 4,
        "form": "auto",
        "epochs": 150,
        "batch_size": 128,
        "lr": 0.01,
        "weight_decay": 0.0,
        "precision": "fp32",
        "limit_train": None,
        "limit_test": None,
        "seeds": [0, 1],
        "collect_only": False,
    }
    return script.plan_of(SimpleNamespace(**{**arguments, **changes}))


def test_arms_differ_in_their_chains_alone(tmp_path):
    made = plan(tmp_path)
    settings = {arm: made.config(arm, 1).deciding() for arm in script.DEFAULT_ARMS}
    plans = {arm: setting["model"].pop("expand") for arm, setting in settings.items()}
    assert plans == {
        **{"baseline": None, "fc": "fc", "cl": "cl", "ck": "ck"},
        **{"cl_fc": "cl+fc", "ck_fc": "ck+fc"},
    }
    first, *others = settings.values()
    assert all(other == first for other in others)
    recipe = ("schedule", "momentum", "nesterov", "weight_decay", "lr", "batch_size", "epochs")
    assert [first[name] for name in recipe] == ["thirds", 0.9, False, 0.0, 0.01, 128, 150]
    assert made.config("ck", 1).eval_every == 1


def test_init_has_a_run_before_it(tmp_path):
    made = plan(tmp_path)
    before, after = (made.config("ck_init", 3, before=before) for before in (True, False))
    assert before.model["activation"] == "relu"
    assert before.init_from is None
    assert after.init_from == before.out
    assert "activation" not in after.model
    assert {before.out, after.out} == {str(tmp_path / "ck_relu_s3"), str(tmp_path / "ck_init_s3")}


def test_names_of_results(tmp_path):
    assert plan(tmp_path).name == "expandnets_cifar10"
    assert plan(tmp_path, task="cifar100:fine", kernel=3).name == "expandnets_cifar100_kernel3"


def finish(made, arm, seed, last, curve):
    folder = made.folder(arm, seed)
    folder.mkdir(parents=True)
    best = max(curve)
    document = {
        "config": made.config(arm, seed).to_json(),
        "seconds": 60.0,
        "results": [{"params": 5, "macs": 7, "accuracy": last}],
        "best_epochs": [{"epoch": curve.index(best) + 1, "accuracy": best}],
    }
    (folder / "results.json").write_text(json.dumps(document))
    lines = [json.dumps({"test_accuracy": value}) for value in curve]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_last_best_and_the_gap(tmp_path):
    made = plan(tmp_path, collect_only=True)
    for arm, curves in {
        "baseline": ([0.3, 0.2], [0.4, 0.4]),
        "ck": ([0.5, 0.6], [0.6, 0.7]),
    }.items():
        for seed, curve in enumerate(curves):
            finish(made, arm, seed, curve[-1], curve)
    found = script.collect(made, ["baseline", "ck"])
    assert found["baseline"]["last_percent"] == pytest.approx([20, 40])
    assert found["baseline"]["best_percent"] == pytest.approx([30, 40])
    assert found["baseline"]["best_epoch"] == [1, 1]
    assert found["ck"]["curves_percent"][1] == pytest.approx([60, 70])
    gap = script.gaps(found)["ck"]
    assert gap["last_percent"]["mean"] == pytest.approx(35)
    # Variances 200 and 50 of two seeds each.
    assert gap["last_percent"]["standard_error"] == pytest.approx((200 / 2 + 50 / 2) ** 0.5)
    assert gap["best_percent"]["mean"] == pytest.approx(30)
    with pytest.raises(SystemExit, match="cl must have a finished run, got none"):
        script.collect(made, ["cl"])


def test_runs_of_another_recipe_are_refused(tmp_path):
    made = plan(tmp_path)
    finish(made, "ck", 0, 0.5, [0.5])
    finish(made, "ck", 1, 0.5, [0.5])
    with pytest.raises(SystemExit, match=r"lr: 0\.01 in the checkpoint, 0\.1 here"):
        script.collect(plan(tmp_path, lr=0.1), ["ck"])
