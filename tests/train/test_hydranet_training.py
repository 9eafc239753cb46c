import json
import warnings

import pytest
import torch
from train.hydra_tiny import MODEL, hydra_config

import pyeff
from pyeff.checkpoint import read_archive
from pyeff.train import Trainer, TrainingInterrupted, hydranet_session
from pyeff.train.calibrate import calibrate
from pyeff.train.evaluate import evaluate
from pyeff.train.gate_statistics import statistics_of
from pyeff.train.hydranet_session import CollapseWarning
from pyeff.train.hydranet_step import HydraStep
from pyeff.train.optimizer import decayed_names
from pyeff.train.report import evaluate_checkpoint, train_and_report
from pyeff.train.session import Session


def untimed(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def interrupt_at(monkeypatch, step):
    """A SIGINT from the terminal while the given step runs."""
    import signal

    original, sent = Session._update, []

    def update(self, batches, levels, now):
        if now == step and not sent:
            sent.append(now)
            signal.raise_signal(signal.SIGINT)
        return original(self, batches, levels, now)

    monkeypatch.setattr(Session, "_update", update)


def test_learns_the_digits_and_the_gate_its_groups(tmp_path):
    config = hydra_config(
        tmp_path,
        epochs=6,
        limit_train=480,
        limit_test=None,
        eval_every=6,
        save_every=6,
        model={**MODEL, "widths": [8, 8, 16]},
    )
    result = Trainer(config).fit()
    assert result.accuracy["digits", 1] > 0.6
    assert result.gate.accuracy == pytest.approx(result.accuracy["digits", 1], abs=1e-6)
    assert result.gate.topk > result.gate.top1 > 0.5
    losses = [r["train_loss"] for r in result.records]
    assert losses[-1] < 0.6 * losses[0]
    assert not result.model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_forcing_epochs": 1, "precision": "bf16", "branch_mean": "routed"},
        {"model": {**MODEL, "gate": "noisy_topk"}, "calibrate": 2},
        {"model": {**MODEL, "gate": "learn", "k": 1}, "clip": 1.0},
    ],
    ids=["supervised", "noisy", "learn"],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, changes):
    whole = Trainer(hydra_config(tmp_path / "whole", **changes))
    expected = whole.fit()
    config = hydra_config(tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)  # in the middle of epoch 1 of 3 steps
        with pytest.raises(TrainingInterrupted, match="after step 2 of 6"):
            Trainer(config).fit()
    torch.manual_seed(99)
    parts = Trainer(config)
    result = parts.fit(resume=True)
    assert result.accuracy == expected.accuracy
    assert untimed(result.records) == untimed(expected.records)
    assert result.gate == expected.gate
    mine, theirs = (read_archive(t.checkpoint)[0] for t in (parts, whole))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def test_records_have_the_gate_of_the_epoch(tmp_path):
    trainer = Trainer(hydra_config(tmp_path, eval_every=2))
    result = trainer.fit()
    first, second = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [first, second] == result.records
    assert set(first["gate"]) == {"train"}
    assert set(second["gate"]) == {"train", "test"}
    for record in (first, second):
        gate = record["gate"]["train"]
        assert gate["images"] == 96
        assert sum(gate["use"]) == pytest.approx(1)
        assert 0 <= gate["top1"] <= gate["topk"] <= 1
    statistics = statistics_of(result.model)
    evaluate(result.model, trainer.tasks, statistics=statistics)
    assert second["gate"]["test"] == statistics.summary().to_json(whole=False)
    assert result.gate == statistics.summary()


def test_branches_learn_from_the_mean_over_their_images(tmp_path):
    """One step of plain gradient descent in float64: how far each parameter went."""

    def trained(name, **changes):
        config = hydra_config(
            tmp_path / name,
            **{"epochs": 1, "limit_train": 32, "batch_size": 32, "precision": "fp64"},
            **{"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0, **changes},
        )
        return Trainer(config).fit().model

    start = trained("start", lr=1e-300)
    batch, routed = trained("batch", lr=0.1), trained("routed", lr=0.1, branch_mean="routed")
    factor, moved = start.n_b / start.k, set()
    others = zip(batch.named_parameters(), routed.parameters(), strict=True)
    for ((name, a), b), origin in zip(others, start.parameters(), strict=True):
        owned = name.startswith("branches.") or name == "combiner.weight"
        assert torch.allclose(b - origin, (factor if owned else 1) * (a - origin), atol=1e-15), name
        if not torch.equal(a, origin):
            moved.add(name.split(".")[0])
    assert factor > 1
    assert moved == {"stem", "gate", "branches", "combiner"}


def test_teacher_forcing_ends_with_its_epochs(tmp_path, monkeypatch):
    seen, original = [], HydraStep.loss

    def loss(self, *arguments):
        seen.append(self.forced)
        return original(self, *arguments)

    monkeypatch.setattr(HydraStep, "loss", loss)
    Trainer(hydra_config(tmp_path, teacher_forcing_epochs=1)).fit()
    assert seen == [True] * 3 + [False] * 3


def test_two_runs_of_one_seed_are_one_run(tmp_path):
    model = {**MODEL, "gate": "noisy_topk"}
    runs = [Trainer(hydra_config(tmp_path / n, model=model, epochs=1)) for n in "ab"]
    results = [run.fit() for run in runs]
    other = Trainer(hydra_config(tmp_path / "c", model=model, epochs=1, seed=1)).fit()
    assert untimed(results[0].records) == untimed(results[1].records)
    for (name, a), b in zip(
        results[0].model.state_dict().items(), results[1].model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert untimed(other.records) != untimed(results[0].records)


def test_a_collapsing_gate_is_told_once(tmp_path, monkeypatch):
    original = HydraStep.loss

    def loss(self, *arguments):
        with torch.no_grad():
            self.model.gate.top_k.score.bias[:2] += 100.0
        return original(self, *arguments)

    monkeypatch.setattr(HydraStep, "loss", loss)
    monkeypatch.setattr(hydranet_session, "FIRST_STEPS", 6)
    with pytest.warns(CollapseWarning) as told:
        Trainer(hydra_config(tmp_path, epochs=4)).fit()
    assert len(told) == 1
    text = str(told[0].message)
    assert text.startswith("train: epoch 2: the gate collapses: the entropy of its use is 0.43")
    assert "3 of 5 branches get less than 5% of even use (2, 3, 4)" in text


def test_an_even_gate_is_not_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(hydranet_session, "FIRST_STEPS", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        Trainer(hydra_config(tmp_path, teacher_forcing_epochs=2, model={**MODEL, "k": 1})).fit()


def test_scores_that_are_nan_end_the_run(tmp_path, monkeypatch):
    trainer, original, calls = Trainer(hydra_config(tmp_path)), HydraStep.loss, []

    def loss(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                self.model.gate.top_k.score.weight.fill_(float("nan"))
        return original(self, *arguments)

    monkeypatch.setattr(HydraStep, "loss", loss)
    with pytest.raises(
        FloatingPointError, match=r"got NaN at step 5 \(epoch 2\); the last good checkpoint is"
    ):
        trainer.fit()
    assert read_archive(trainer.checkpoint)[1]["step"] == 3


def test_weight_decay_is_for_stacked_weights_too():
    model = pyeff.models.build({**MODEL, "classes": 10})
    decayed = decayed_names(model)
    stacked = {n for n, p in model.named_parameters() if p.dim() == 5}
    assert stacked
    assert stacked <= decayed
    assert "combiner.weight" in decayed
    norms = {n for n in decayed if "norm" in n or n.endswith("bias")}
    assert norms == set()


def test_calibration_reaches_the_branches(tmp_path):
    model = pyeff.models.build({**MODEL, "classes": 10, "in_channels": 1, "k": 5})
    x = torch.randn(64, 1, 8, 8) * 3 + 1
    calibrate(model, {"digits": [x]})
    with torch.no_grad():
        expected = model.train()(x)
        # With one batch the plain average is that batch's; its variance is the unbiased one.
        torch.testing.assert_close(model.eval()(x), expected, rtol=0.2, atol=0.05)


def test_report_files_and_evaluation_of_the_checkpoint(tmp_path):
    result = train_and_report(hydra_config(tmp_path, epochs=1))
    for name in ("use.png", "branches.png", "levels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (line,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert line["gate"] == json.loads(json.dumps(result.gate.to_json()))
    model = pyeff.load(tmp_path)
    assert line["params"] == sum(p.numel() for p in model.parameters())
    assert line["macs"] == model.costs(8).macs
    (again,) = evaluate_checkpoint(str(tmp_path), latency=False)
    assert again.to_json() == {**line, "latency_s": None}
    (fewer,) = evaluate_checkpoint(str(tmp_path), latency=False, k=1)
    assert fewer.macs == model.costs(8, k=1).macs < line["macs"]
    assert fewer.gate["top1"] == fewer.gate["topk"] == line["gate"]["top1"]


def test_k_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5, got 6"):
        Trainer(hydra_config(tmp_path, model={**MODEL, "k": 6})).fit()
    train_and_report(hydra_config(tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5, got 9"):
        evaluate_checkpoint(str(tmp_path / "run"), k=9)


def test_one_task_only(tmp_path):
    with pytest.raises(ValueError, match="hydranet_resnet must have one task, got"):
        Trainer(hydra_config(tmp_path, tasks=("digits:class", "digits:parity"))).fit()
