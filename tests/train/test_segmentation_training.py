import importlib
import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from train.segmentation_tiny import MODEL, segmentation_config

from pyeff.checkpoint import load, read_archive
from pyeff.train import TrainingInterrupted
from pyeff.train.segmentation_config import (
    SegmentationConfig,
    load_segmentation,
    segmentation_config_from_json,
)
from pyeff.train.segmentation_report import train_and_report_segmentation
from pyeff.train.segmentation_session import SegmentationSession
from pyeff.train.segmentation_state import adam_tensors, load_adam_tensors
from pyeff.train.segmentation_trainer import SegmentationTrainer


@pytest.fixture(scope="module")
def streets():
    return load_segmentation(segmentation_config("unused"))


def weights(trainer):
    return read_archive(trainer.checkpoint)[0]


def untimed(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def at_step(monkeypatch, step, act):
    """Does something in the middle of a step, once."""
    original, done = SegmentationSession._update, []

    def update(self, now):
        if now == step and not done:
            done.append(now)
            act(self)
        return original(self, now)

    monkeypatch.setattr(SegmentationSession, "_update", update)


def test_learns_what_is_sky_and_what_is_road(tmp_path):
    config = segmentation_config(
        tmp_path,
        model={"family": "erfnet", "widths": [6, 12, 16], "dropout": [0.0, 0.0]},
        size=(24, 32),
        scenes=16,
        stage1_epochs=6,
        epochs=12,
        lr=5e-3,
        eval_every=8,
        save_every=8,
    )
    result = SegmentationTrainer(config).fit()
    (score,) = result.scores
    assert score.split == "test"
    assert score.class_iou["sky"] > 0.3
    assert score.class_iou["road"] > 0.3
    losses = [r["train_loss"] for r in result.records if r["stage"] == 2]
    assert losses[-1] < 0.8 * losses[0]
    assert not result.model.training


def test_two_stages_and_their_records(tmp_path, streets):
    config = segmentation_config(tmp_path, stage1_epochs=2, epochs=3, eval_every=2, lr=1e-3)
    result = SegmentationTrainer(config, streets).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.records
    assert [(r["stage"], r["epoch"], r["step"]) for r in lines] == [
        (1, 1, 2),
        (1, 2, 4),
        (2, 1, 6),
        (2, 2, 8),
        (2, 3, 10),
    ]
    # Every other epoch, and a stage's last one.
    assert [r["val_miou"] is not None for r in lines] == [False, True, False, True, True]
    expected = [1e-3, 1e-3 * 0.5**0.9, 1e-3, 1e-3 * (2 / 3) ** 0.9, 1e-3 * (1 / 3) ** 0.9]
    assert [r["lr"] for r in lines] == pytest.approx(expected)


def test_stage_2_starts_with_the_encoder_of_stage_1(tmp_path, streets, monkeypatch):
    seen = {}

    def first(session):
        assert session.model.decoder is None
        assert session.optimizer.param_groups[0]["weight_decay"] == session.config.weight_decay
        trained = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in session.model.parameters()}
        seen["weights"] = session.weights.clone()

    def after(session):
        seen["encoder"] = {n: t.clone() for n, t in session.model.encoder.state_dict().items()}
        seen["decoder"] = next(session.model.decoder.parameters()).clone()
        seen["moments"] = len(session.optimizer.state)
        assert not torch.equal(session.weights, seen["weights"])

    config = segmentation_config(tmp_path, epochs=1)
    end_epoch = SegmentationSession._end_epoch

    def kept(self, bar):
        end_epoch(self, bar)
        if self.stage == 1:
            seen["last"] = {n: t.clone() for n, t in self.model.encoder.state_dict().items()}

    monkeypatch.setattr(SegmentationSession, "_end_epoch", kept)
    with monkeypatch.context() as patch:
        at_step(patch, 0, first)
        at_step(patch, 2, after)
        SegmentationTrainer(config, streets).fit()
    assert seen["moments"] == 0
    for name, tensor in seen["last"].items():
        assert torch.equal(tensor, seen["encoder"][name]), name


@pytest.mark.parametrize("step", [0, 1, 2, 4], ids=["stage1", "stage1_end", "stage2", "epoch2"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, streets, monkeypatch, step):
    whole = SegmentationTrainer(segmentation_config(tmp_path / "whole"), streets)
    expected = whole.fit()
    config = segmentation_config(tmp_path / "parts")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda session: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted, match=f"after step {step + 1} of 6"):
            SegmentationTrainer(config, streets).fit()
    torch.manual_seed(99)
    parts = SegmentationTrainer(config, streets)
    result = parts.fit(resume=True)
    assert untimed(result.records) == untimed(expected.records)
    assert result.scores == expected.scores
    found = weights(parts)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("keep", ["best", "last"])
def test_which_weights_are_kept(tmp_path, streets, monkeypatch, keep):
    """The second of three epochs is made the best."""
    from pyeff.train import segmentation_session

    original, found = segmentation_session.evaluate_segmentation, []

    def evaluate(model, data, split, **options):
        scores = original(model, data, split, **options)
        if split == "val" and model.decoder is not None:
            found.append({n: t.clone() for n, t in model.state_dict().items()})
            return [replace(scores[0], miou=(0.2, 0.9, 0.9)[len(found) - 1])]
        return scores

    monkeypatch.setattr(segmentation_session, "evaluate_segmentation", evaluate)
    config = segmentation_config(tmp_path, stage1_epochs=0, epochs=3, keep=keep)
    result = SegmentationTrainer(config, streets).fit()
    assert result.epoch == (2 if keep == "best" else 3)
    wanted = found[1 if keep == "best" else 2]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_starting_from_another_run(tmp_path, streets, monkeypatch):
    first = SegmentationTrainer(segmentation_config(tmp_path / "a", epochs=1), streets).fit()
    seen = {}

    def copy(session):
        seen[session.stage] = {n: t.clone() for n, t in session.model.state_dict().items()}

    config = segmentation_config(tmp_path / "b", init_from=str(tmp_path / "a"), epochs=1)
    with monkeypatch.context() as patch:
        at_step(patch, 0, copy)
        at_step(patch, 2, copy)
        result = SegmentationTrainer(config, streets).fit()
    assert result.left_fresh == []
    theirs = first.model.state_dict()
    for name, tensor in theirs.items():
        if name.startswith("encoder."):
            assert torch.equal(seen[1][name], tensor), name
        else:
            assert torch.equal(seen[2][name], tensor), name
    assert not torch.equal(seen[2]["encoder.0.conv.weight"], theirs["encoder.0.conv.weight"])


def test_resuming_needs_the_other_run_no_more_than_stage_2_does(tmp_path, streets, monkeypatch):
    start = tmp_path / "a"
    SegmentationTrainer(segmentation_config(start, epochs=1), streets).fit()
    config = segmentation_config(tmp_path / "b", init_from=str(start))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda session: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted, match="after step 4"):
            SegmentationTrainer(config, streets).fit()
    for file in start.iterdir():
        file.unlink()
    start.rmdir()
    result = SegmentationTrainer(config, streets).fit(resume=True)
    assert [r["step"] for r in result.records] == [2, 4, 6]


def test_a_start_that_cannot_be_leaves_the_folder_as_it_was(tmp_path, streets):
    config = segmentation_config(tmp_path / "a", epochs=1, stage1_epochs=0)
    SegmentationTrainer(config, streets).fit()
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    gone = replace(config, init_from=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        SegmentationTrainer(gone, streets).fit(overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_a_run_that_is_overwritten_leaves_nothing_that_would_pass_for_the_new_one(
    tmp_path, streets, monkeypatch
):
    config = segmentation_config(tmp_path, stage1_epochs=0, epochs=1)
    train_and_report_segmentation(config)
    written = {"checkpoint.safetensors", "model.safetensors", "best.safetensors", "results.json"}
    assert {p.name for p in tmp_path.iterdir()} >= {*written, "course.png", "frames.png"}

    def stop(session):
        raise OSError("out of power")

    at_step(monkeypatch, 0, stop)
    with pytest.raises(OSError, match="out of power"):
        SegmentationTrainer(config, streets).fit(overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("began", [True, False])
def test_resuming_augments_as_the_run_began(tmp_path, streets, monkeypatch, began):
    """Whether torchvision has come or gone meanwhile."""
    from pyeff.train import segmentation_augment, segmentation_session

    ways = []

    def by_torchvision(images, labels, shift, seed):
        ways.append(True)
        return images, labels

    def by_ours(images, labels, shift, generator):
        ways.append(False)
        return images, labels

    monkeypatch.setattr(segmentation_augment, "augment_by_torchvision", by_torchvision)
    monkeypatch.setattr(segmentation_augment, "augment_pairs", by_ours)
    monkeypatch.setattr(segmentation_augment, "has_torchvision", lambda: began)
    config = segmentation_config(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda session: signal.raise_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted):
            SegmentationTrainer(config, streets).fit()
    monkeypatch.setattr(segmentation_augment, "has_torchvision", lambda: not began)
    if began:
        monkeypatch.setattr(segmentation_session, "has_torchvision", lambda: False)
        with pytest.raises(ValueError, match=r"must go on with torchvision, .* pyeff\[vision\]"):
            SegmentationTrainer(config, streets).fit(resume=True)
    monkeypatch.setattr(segmentation_session, "has_torchvision", lambda: True)
    SegmentationTrainer(config, streets).fit(resume=True)
    assert ways == [began] * 6


def test_starting_from_a_run_of_other_classes_or_another_network(tmp_path, streets):
    few = replace(streets, class_names=("x",) * 20, palette=((0, 0, 0),) * 20)
    config = segmentation_config(tmp_path / "a", epochs=1, stage1_epochs=0)
    SegmentationTrainer(config, few).fit()
    config = replace(config, out=str(tmp_path / "b"), init_from=str(tmp_path / "a"))
    result = SegmentationTrainer(config, streets).fit()
    assert result.left_fresh == ["decoder.6.weight", "decoder.6.bias"]
    wide = replace(config, model={**MODEL, "widths": [4, 8, 16]}, out=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"must hold this network's encoder, got .* encoder"):
        SegmentationTrainer(wide, streets).fit()


def refuse(module):
    """As torchmetrics does beside a torchvision that was built for another torch."""
    if module.startswith("torchmetrics"):
        raise RuntimeError("operator torchvision::nms does not exist")
    return __import__(module, fromlist=["-"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda patch: patch.setitem(sys.modules, "torchmetrics.classification", None),
            r"torchmetrics is needed to evaluate: pip install pyeff\[train\]",
        ),
        (
            lambda patch: patch.setattr(importlib, "import_module", refuse),
            "torchmetrics is needed to evaluate, got one that does not load: operator torchvision",
        ),
    ],
    ids=["missing", "broken"],
)
def test_what_evaluation_needs_is_missed_before_training(
    tmp_path, streets, monkeypatch, spoil, message
):
    config = segmentation_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(ImportError, match=message):
            SegmentationTrainer(config, streets).fit()
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite(tmp_path, streets, monkeypatch):
    def spoil(session):
        with torch.no_grad():
            next(session.model.parameters()).fill_(float("nan"))

    at_step(monkeypatch, 5, spoil)
    trainer = SegmentationTrainer(segmentation_config(tmp_path), streets)
    with pytest.raises(
        FloatingPointError,
        match=r"got nan at step 6 \(stage 2, epoch 2\); the last good checkpoint is .*safetensors",
    ):
        trainer.fit()
    assert read_archive(trainer.checkpoint)[1]["progress"]["step"] == 4


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path, streets, monkeypatch):
    original = SegmentationSession._update

    def update(self, step):
        loss = original(self, step)
        if step == 5:
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = float("inf")
        return loss

    monkeypatch.setattr(SegmentationSession, "_update", update)
    trainer = SegmentationTrainer(segmentation_config(tmp_path), streets)
    with pytest.raises(FloatingPointError, match="weights must be finite to be saved"):
        trainer.fit()
    assert read_archive(trainer.checkpoint)[1]["progress"]["step"] == 4


def test_resuming_another_run_is_refused(tmp_path, streets):
    config = segmentation_config(tmp_path, epochs=1)
    SegmentationTrainer(config, streets).fit()
    with pytest.raises(FileExistsError, match="resume it, overwrite it"):
        SegmentationTrainer(config, streets).fit()
    other = segmentation_config(tmp_path, epochs=1, lr=0.2)
    with pytest.raises(ValueError, match=r"same settings, got: lr: 0\.0005 .* 0\.2 here"):
        SegmentationTrainer(other, streets).fit(resume=True)
    # Where the data lies and how often is saved does not matter.
    moved = segmentation_config(tmp_path, epochs=1, data="elsewhere", save_every=3)
    SegmentationTrainer(moved, streets).fit(resume=True)
    SegmentationTrainer(config, streets).fit(overwrite=True)
    with pytest.raises(FileNotFoundError, match="must name a checkpoint"):
        SegmentationTrainer(segmentation_config(tmp_path / "none"), streets).fit(resume=True)


def test_resuming_with_other_data_is_refused(tmp_path, streets):
    config = segmentation_config(tmp_path, stage1_epochs=0, epochs=1)
    SegmentationTrainer(config, streets).fit()
    renamed = replace(streets, class_names=("heaven", *streets.class_names[1:]))
    with pytest.raises(ValueError, match=r"must be of a run with the classes \['heaven', .* got"):
        SegmentationTrainer(config, renamed).fit(resume=True)
    train = streets.split("train")
    fewer = replace(train, images=train.images[:5], labels=train.labels[:5], names=train.names[:5])
    other = replace(streets, splits={**streets.splits, "train": fewer})
    with pytest.raises(ValueError, match="must be of a run with 5 training pictures, got 6"):
        SegmentationTrainer(config, other).fit(resume=True)


def test_moments_that_do_not_fit_are_refused():
    layer = torch.nn.Linear(2, 3)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    whole = adam_tensors(layer, adam)
    load_adam_tensors(layer, adam, whole)
    assert {n: t.tolist() for n, t in adam_tensors(layer, adam).items()} == {
        n: t.tolist() for n, t in whole.items()
    }
    some = {n: t for n, t in whole.items() if n != "optimizer.exp_avg_sq.bias"}
    message = r"resume: bias must have all of Adam's .* shape \[3\], got \[\[3\], None, \[\]\]"
    with pytest.raises(ValueError, match=message):
        load_adam_tensors(layer, adam, some)
    wrong = {**whole, "optimizer.exp_avg.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"weight must have all of .* \[3, 2\], got \[\[2\], "):
        load_adam_tensors(layer, adam, wrong)
    load_adam_tensors(layer, adam, {})
    assert not adam.state


def test_resuming_a_run_of_another_kind_is_refused(tmp_path, streets):
    from train.tiny import tiny_config

    from pyeff.train import Trainer

    Trainer(tiny_config(tmp_path, epochs=1, limit_train=32)).fit()
    with pytest.raises(ValueError, match="must be a run of pyeff train erfnet, got a training"):
        SegmentationTrainer(segmentation_config(tmp_path), streets).fit(resume=True)


def test_report_files(tmp_path):
    result = train_and_report_segmentation(
        segmentation_config(tmp_path, epochs=1, precision="bf16", eval_size="official")
    )
    document = json.loads((tmp_path / "results.json").read_text())
    assert [r["eval_size"] for r in document["results"]] == ["training", "official"]
    assert document["results"][0]["miou"] == result.scores[0].miou
    assert document["cost"]["params"] == sum(p.numel() for p in result.model.parameters())
    assert document["cost"]["macs"] > 0
    assert set(document["seconds_an_epoch"]) == {"1", "2"}
    assert document["config"]["size"] == [16, 24]
    for name in ("course.png", "frames.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    again = load(tmp_path)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dataset": "kitti"}, "dataset must be one of camvid, cityscapes, folder, streets"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp64, got 'fp8'"),
        ({"eval_size": "huge"}, "eval_size must be one of training, official, got 'huge'"),
        ({"keep": "all"}, "keep must be one of best, last"),
        ({"size": (8, 64)}, r"size must be height and width of at least 16 pixels, got \(8, 64\)"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"stage1_epochs": -1}, "stage1_epochs must not be negative, got -1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"limit_test": 0}, "limit_test must be positive, got 0"),
        ({"model": {}}, "model must have a family"),
        ({"init_from": "runs/erfnet"}, "init_from must be of another run than out, 'runs/erfnet'"),
        ({"init_from": "./runs/erfnet/best.safetensors"}, "init_from must be of another run than"),
    ],
)
def test_config_refuses(changes, error):
    with pytest.raises(ValueError, match=f"SegmentationConfig: {error}"):
        SegmentationConfig(**changes)


def test_config_survives_json():
    config = segmentation_config("x", dataset="camvid", data="d")
    again = segmentation_config_from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    with pytest.raises(ValueError, match=r"keys must be known ones, got \['sise'\]"):
        segmentation_config_from_json({"sise": 3})
