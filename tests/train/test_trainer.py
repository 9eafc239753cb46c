import json
import signal

import pytest
import torch
from train.tiny import MODEL, tiny_config

from pyeff.checkpoint import load, read_archive
from pyeff.train import Trainer, TrainingInterrupted
from pyeff.train.evaluate import evaluate
from pyeff.train.report import level_results, train_and_report


def weights(trainer):
    return read_archive(trainer.checkpoint)[0]


def untimed(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def interrupt_at(monkeypatch, step):
    """A SIGINT from the terminal while the given step runs."""
    from pyeff.train.session import Session

    original, sent = Session._update, []

    def update(self, batches, levels, now):
        if now == step and not sent:
            sent.append(now)
            signal.raise_signal(signal.SIGINT)
        return original(self, batches, levels, now)

    monkeypatch.setattr(Session, "_update", update)


def test_learns_the_digits(tmp_path):
    config = tiny_config(
        tmp_path, epochs=8, limit_train=480, limit_test=None, eval_every=8, save_every=8
    )
    result = Trainer(config).fit()
    assert result.accuracy["digits:class", 2] > 0.6
    assert result.accuracy["digits:class", 1] > 0.3
    assert result.accuracy["digits:parity", 2] > 0.75
    losses = [r["train_loss"] for r in result.records if r["task"] == "digits:class"]
    assert losses[-1] < 0.6 * losses[0]
    assert not result.model.training


def test_one_line_an_epoch_task_and_level(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, eval_every=2))
    result = trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.records
    keys = [(r["epoch"], r["task"], r["level"]) for r in lines]
    tasks = ("digits:class", "digits:parity")
    assert keys == [(e, t, level) for e in (1, 2) for t in tasks for level in (1, 2)]
    assert all(r["test_accuracy"] is None for r in lines[:4])
    last = {(r["task"], r["level"]): r["test_accuracy"] for r in lines[4:]}
    assert last == result.accuracy == evaluate(result.model, trainer.tasks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task_rule": "alternate", "distill": True, "clip": 1.0, "schedule": "cosine"},
        {
            "model": {**MODEL, "levels": 4},
            "level_rule": "sandwich",
            "sandwich_levels": 3,
            "precision": "bf16",
        },
    ],
    ids=["plain", "alternate", "sandwich"],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, changes):
    whole = Trainer(tiny_config(tmp_path / "whole", **changes))
    expected = whole.fit()
    config = tiny_config(tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)  # in the middle of epoch 1 of 3 steps
        with pytest.raises(TrainingInterrupted, match="after step 2 of 6"):
            Trainer(config).fit()
    torch.manual_seed(99)
    parts = Trainer(config)
    result = parts.fit(resume=True)
    assert result.accuracy == expected.accuracy
    assert untimed(result.records) == untimed(expected.records)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name


def test_signal_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    Trainer(tiny_config(tmp_path, epochs=1)).fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_takes_metrics_of_the_checkpoint(tmp_path):
    """Lines written after the last checkpoint (a crash) do not stay."""
    trainer = Trainer(tiny_config(tmp_path, save_every=2))
    result = trainer.fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n{"trunc')
    again = Trainer(tiny_config(tmp_path, save_every=2)).fit(resume=True)
    assert again.accuracy == result.accuracy
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def test_loss_that_is_not_finite(tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(tmp_path))
    from pyeff.train.step import TrainStep

    original, calls = TrainStep.loss, []

    def loss(self, x, y, task, level, teacher):
        calls.append(1)
        value, teacher = original(self, x, y, task, level, teacher)
        # Step 5 is the second of epoch 2; four losses a step, the third is parity's level 2.
        return (value * float("nan") if len(calls) == 19 else value), teacher

    monkeypatch.setattr(TrainStep, "loss", loss)
    with pytest.raises(
        FloatingPointError,
        match=r"got nan at step 5 \(epoch 2\) for task 'digits:parity', level 2; the last good "
        r"checkpoint is .*checkpoint\.safetensors",
    ):
        trainer.fit()
    assert read_archive(trainer.checkpoint)[1]["step"] == 3
    assert all(bool(torch.isfinite(t.double()).all()) for t in weights(trainer).values())


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(tmp_path))
    from pyeff.train.session import Session

    original = Session._update

    def update(self, batches, levels, step):
        losses = original(self, batches, levels, step)
        if step == 5:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = float("inf")
        return losses

    monkeypatch.setattr(Session, "_update", update)
    with pytest.raises(FloatingPointError, match="weights must be finite to be saved"):
        trainer.fit()
    assert read_archive(trainer.checkpoint)[1]["step"] == 3


def test_checkpoint_of_another_model_or_run(tmp_path):
    Trainer(tiny_config(tmp_path, epochs=1)).fit()
    other = {**MODEL, "widths": [4, 8, 16], "levels": 1}
    with pytest.raises(
        ValueError, match=r"same model, got: levels: 2 .* 1 here; widths: \[4, 8, 8\]"
    ):
        Trainer(tiny_config(tmp_path, epochs=1, model=other)).fit(resume=True)
    with pytest.raises(ValueError, match=r"same settings, got: lr: 0\.1 .* 0\.2 here"):
        Trainer(tiny_config(tmp_path, epochs=1, lr=0.2)).fit(resume=True)


def test_existing_run_is_not_overwritten_unasked(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    train_and_report(config)
    with pytest.raises(FileExistsError, match="resume it, overwrite it"):
        Trainer(config).fit()
    Trainer(config).fit(overwrite=True)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="must name a checkpoint"):
        Trainer(tiny_config(tmp_path / "other")).fit(resume=True)


@pytest.mark.parametrize("strategy", ["channel", "layer", "weight"])
def test_nestednet_trains_and_its_masks_reach_their_shares(tmp_path, strategy):
    model = {**MODEL, "family": "nestednet", "strategy": strategy}
    result = Trainer(tiny_config(tmp_path, model=model, tasks=("digits",), calibrate=2)).fit()
    assert set(result.accuracy) == {("digits", 1), ("digits", 2)}
    if strategy == "weight":
        conv = result.model.blocks[0].conv1
        share = conv.mask(1).double().mean().item()
        assert share == pytest.approx(0.5, abs=0.01)
        assert bool(conv.mask(2).all())


def test_plain_backbone_is_trained_by_the_same_loop(tmp_path):
    model = {"family": "backbone", "backbone": "resnet8", "widths": [4, 8, 8]}
    trainer = Trainer(tiny_config(tmp_path, model=model, tasks=("digits",)))
    result = trainer.fit()
    assert set(result.accuracy) == {("digits", 1)}
    (line,) = level_results(result.model, {"digits": (1, 8, 8)}, result.accuracy)
    assert line.params == sum(p.numel() for p in result.model.parameters())
    with pytest.raises(ValueError, match="backbone must have one task"):
        Trainer(tiny_config(tmp_path, model=model)).fit(overwrite=True)


@pytest.mark.parametrize(
    "model",
    [
        {"family": "decomposeme", "width": [4] * 8, "pools": [1, 2]},
        {"family": "decomposeme", "width": [4] * 8, "pools": [1, 2], "dense": True},
        {"family": "dec3", "width": 4},
        {"family": "resnet50_decomposed", "widths": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
    ],
    ids=lambda model: "_".join([model["family"], *(["dense"] if "dense" in model else [])]),
)
def test_networks_of_pairs_are_trained_by_the_same_loop(tmp_path, model):
    config = tiny_config(tmp_path, model=model, tasks=("digits",), epochs=1, precision="bf16")
    train_and_report(config)
    (line,) = json.loads((tmp_path / "results.json").read_text())["results"]
    loaded = load(tmp_path)
    assert line["params"] == sum(p.numel() for p in loaded.parameters())
    assert line["macs"] > 0
    trainer = Trainer(config)
    assert evaluate(loaded, trainer.tasks)["digits", 1] == line["accuracy"]


def test_report_files(tmp_path):
    train_and_report(tiny_config(tmp_path, epochs=1, calibrate=1))
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["results"]) == 4
    assert document["config"]["seed"] == 0
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
    lines = document["results"]
    assert lines[0]["params"] < lines[1]["params"]
    assert lines[0]["macs"] < lines[1]["macs"]
