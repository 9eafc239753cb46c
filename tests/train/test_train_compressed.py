import json
import signal
from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_config
from train.together import run

import pyeff
from pyeff.checkpoint import read_archive
from pyeff.compress import Compressor
from pyeff.train import TrainConfig, Trainer, TrainingInterrupted
from pyeff.train.compress_session import layer_counts
from pyeff.train.evaluate import evaluate
from pyeff.train.report import train_and_report
from pyeff.train.session import Session

SCRIPT = "compress_distributed_run.py"
MODEL = {"family": "dec3", "width": 16}


def config(out, **changes):
    settings = {
        "tasks": ("digits",),
        "model": MODEL,
        "epochs": 3,
        "lr": 0.05,
        "compress": {"group": "auto", "rank": "auto"},
        "target_params": 0.5,
        "reload_epoch": 2,
    }
    return tiny_config(out, **{**settings, **changes})


def weights(trainer):
    return read_archive(trainer.checkpoint)[0]


def untimed(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def interrupt_at(monkeypatch, step):
    """A SIGINT from the terminal while the given step runs."""
    original, sent = Session._update, []

    def update(self, batches, levels, now):
        if now == step and not sent:
            sent.append(now)
            signal.raise_signal(signal.SIGINT)
        return original(self, batches, levels, now)

    monkeypatch.setattr(Session, "_update", update)


def test_the_network_gets_smaller_in_the_middle_of_its_training(tmp_path):
    trainer = Trainer(config(tmp_path, eval_every=3))
    result = trainer.fit()
    assert result.model.config["family"] == "compressed"
    assert result.model.config["base"]["family"] == "dec3"
    before, after = result.compressed["parameters"]
    assert after == sum(p.numel() for p in result.model.parameters()) <= 0.5 * before
    sizes = [record["compression"]["parameters"] for record in result.records]
    assert sizes == [before, after, after]
    live = layer_counts(result.records, "group", "live")
    ranks = layer_counts(result.records, "rank", "ranks")
    assert list(live) == list(ranks) == [1, 2]
    assert result.accuracy == evaluate(result.model, trainer.tasks)
    # The small network was trained with the momenta of the large one and moved on.
    names = {name.removeprefix("optimizer.momentum.") for name in weights(trainer)}
    assert {name for name, _ in result.model.named_parameters()} <= names


def test_without_a_reload_epoch_it_gets_smaller_at_the_end(tmp_path):
    result = Trainer(config(tmp_path, epochs=2, reload_epoch=None)).fit()
    sizes = [record["compression"]["parameters"] for record in result.records]
    assert sizes[0] == result.compressed["parameters"][0] > sizes[1]
    assert result.model.config["family"] == "compressed"


@pytest.mark.parametrize("name", ["group", "rank"])
def test_right_after_the_penalties_the_network_is_good(tmp_path, name):
    """Batch norm's running statistics are those of the weights as the penalties left them."""
    model = {"family": "backbone", "backbone": "resnet8", "widths": [16, 16, 16]}
    changes = {"epochs": 4, "limit_train": 480, "lr": 0.1, "eval_every": 4, "save_every": 4}
    settings = config(
        tmp_path, model=model, compress={name: "auto"}, target_params=0.7, reload_epoch=None
    )
    result = Trainer(replace(settings, **changes)).fit()
    assert result.compressed["parameters"][1] <= 0.7 * result.compressed["parameters"][0]
    assert result.accuracy["digits", 1] > 0.5


@pytest.mark.parametrize(
    ("step", "compress"),
    [
        (2, {"group": "auto", "rank": "auto", "mask": True}),
        (4, {"group": "auto", "every": 2}),
        (6, {"group": "auto", "rank": "auto"}),
        (7, {"rank": "auto"}),
    ],
    ids=["first epoch", "second epoch", "after the reload", "low rank"],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, step, compress):
    # Three steps an epoch; the reload is after step 5. Group sparsity alone keeps its floors.
    changes = {"compress": compress, "target_params": 0.7}
    whole = Trainer(config(tmp_path / "whole", **changes))
    expected = whole.fit()
    settings = config(tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(TrainingInterrupted, match=f"after step {step + 1} of 9"):
            Trainer(settings).fit()
    torch.manual_seed(99)
    parts = Trainer(settings)
    result = parts.fit(resume=True)
    assert result.accuracy == expected.accuracy
    assert untimed(result.records) == untimed(expected.records)
    assert result.compressed == expected.compressed
    for name, tensor in weights(whole).items():
        if name != "random.cpu":
            assert torch.equal(weights(parts)[name], tensor), name


def test_a_finished_run_is_resumed_with_its_small_network(tmp_path):
    first = Trainer(config(tmp_path)).fit()
    again = Trainer(config(tmp_path)).fit(resume=True)
    assert again.accuracy == first.accuracy
    assert again.compressed == first.compressed
    with pytest.raises(ValueError, match="same model, got: width: 16 in the checkpoint, 24 here"):
        Trainer(config(tmp_path, model={**MODEL, "width": 24})).fit(resume=True)
    with pytest.raises(ValueError, match="same settings, got: energy"):
        Trainer(config(tmp_path, energy=0.3)).fit(resume=True)


def test_a_reload_that_finds_nothing_to_do_is_resumed(tmp_path, monkeypatch):
    changes = {"compress": {"group": 1e-9}, "target_params": None, "reload_epoch": 1}
    settings = config(tmp_path, **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(TrainingInterrupted, match="after step 5 of 9"):
            Trainer(settings).fit()
    result = Trainer(settings).fit(resume=True)
    assert result.model.config["family"] == "dec3"
    assert result.compressed["parameters"][0] == result.compressed["parameters"][1]
    assert len(result.records) == 3


def test_every_step_between_the_penalties_is_told_the_rate(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Compressor, "after_step", lambda self, lr: told.append(lr))
    result = Trainer(config(tmp_path, schedule="constant")).fit()
    assert told == [0.05] * 6
    assert len(result.records) == 3


def test_files_of_a_run(tmp_path):
    result = train_and_report(config(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"compression.json", "neurons.png", "live.png", "ranks.png", "levels.png"} <= names
    document = json.loads((tmp_path / "compression.json").read_text())
    assert document["parameters"] == result.compressed["parameters"]
    assert set(document["live"]) == {"1", "2"}
    line = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert line["params"] == document["parameters"][1]
    loaded = pyeff.load(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), result.model(x))


def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path):
    alone, meta = run(SCRIPT, tmp_path / "one", processes=1)
    together, joint_meta = run(SCRIPT, tmp_path / "two", processes=2)
    assert joint_meta["model"] == meta["model"]
    assert meta["model"]["family"] == "compressed"
    assert set(together) == set(alone)
    for mine, theirs in zip(meta["records"], joint_meta["records"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-7)
        assert theirs["test_accuracy"] == pytest.approx(mine["test_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress": None}, "target_params must be left out without compress, got 0.5"),
        ({"target_params": 1.0}, r"target_params must be in \(0, 1\), got 1.0"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
        ({"reload_epoch": 4}, r"reload_epoch must be in 1..3, got 4"),
        ({"model": {"family": "dvn"}}, "model must be a classifier of one task and one level"),
        ({"model": {"family": "hydranet_resnet"}}, "model must be a classifier of one task"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        config(tmp_path, **changes)
    with pytest.raises(ValueError, match="compress: options must name group or rank"):
        TrainConfig(compress={"alpha": 0.5})


def test_the_settings_survive_json(tmp_path):
    from pyeff.train import config_from_json

    settings = config(tmp_path, compress={"group": "0.5", "rank": "auto", "every": "3"})
    assert settings.compress == {"group": 0.5, "rank": "auto", "every": 3}
    assert config_from_json(json.loads(json.dumps(settings.to_json()))) == settings
