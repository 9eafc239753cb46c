import json

import pytest
import torch
from train.hydra_tiny import MODEL, hydra_config
from train.test_hydranet_training import interrupt_at, untimed

import pyeff
from pyeff.checkpoint import read_archive, save
from pyeff.models import build
from pyeff.train import TrainConfig, Trainer, TrainingInterrupted
from pyeff.train.partition_run import (
    branches_of,
    load_reference,
    mean_class_outputs,
    needs_partition,
    partition,
    read_partition,
    write_partition,
)
from pyeff.train.processes import Processes
from pyeff.train.report import train_and_report
from pyeff.train.state import read_config
from pyeff.train.tasks import load_tasks

ALONE = Processes(0, 1, torch.device("cpu"))
EVEN = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]


@pytest.fixture(scope="module")
def digits():
    return load_tasks(("digits",), limit_train=96, limit_test=64)[0]


def owners(trainer):
    return read_archive(trainer.checkpoint)[1]["model"]["class_groups"]


class Said(torch.nn.Module):
    """Puts out one number for each image: its mean brightness, and that doubled."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return x.mean((1, 2, 3)).unsqueeze(1) * self.scale


def test_means_are_those_of_the_training_images_of_each_class(digits):
    found = mean_class_outputs(Said(), digits, batch_size=10)
    for c in range(10):
        images = digits.train_images[digits.train_labels == c].double() / 255
        expected = (images.mean() - digits.mean[0]) / digits.std[0]
        torch.testing.assert_close(
            found[c], torch.stack([expected, 2 * expected]), rtol=1e-5, atol=1e-5
        )


def test_a_class_without_images():
    (task,) = load_tasks(("digits",), limit_train=4)
    with pytest.raises(ValueError, match="must have a training image, got none of class '"):
        mean_class_outputs(Said(), task)


def test_a_reference_classifier_is_trained_and_its_partition_kept(tmp_path, digits):
    trainer = Trainer(hydra_config(tmp_path, partition="auto", epochs=1))
    result = trainer.fit()
    written = json.loads((tmp_path / "partition.json").read_text())
    groups = written["class_groups"]
    assert torch.bincount(torch.tensor(groups)).tolist() == [2] * 5
    assert owners(trainer) == groups == result.model.class_group.tolist()
    model, task = load_reference(str(tmp_path / "reference"), digits, torch.device("cpu"))
    outputs = mean_class_outputs(model, task)
    expected = pyeff.models.hydranet.partition_classes(outputs, 5, method="greedy", seed=0)
    assert groups == expected.tolist()
    assert written["branches"] == [[str(c) for c in range(10) if groups[c] == b] for b in range(5)]


def test_a_given_reference_gives_the_partition_of_the_trained_one(tmp_path):
    Trainer(hydra_config(tmp_path / "a", partition="auto", epochs=1)).fit()
    given = hydra_config(
        tmp_path / "b", partition="auto", epochs=1, reference=str(tmp_path / "a/reference")
    )
    Trainer(given).fit()
    assert not (tmp_path / "b/reference").exists()
    files = [json.loads((tmp_path / n / "partition.json").read_text()) for n in "ab"]
    assert files[0] == files[1]


def test_the_partition_comes_back_with_the_model(tmp_path):
    train_and_report(hydra_config(tmp_path, epochs=1, seed=3))
    groups = json.loads((tmp_path / "partition.json").read_text())["class_groups"]
    assert groups != sorted(groups)
    assert pyeff.load(tmp_path).class_group.tolist() == groups
    assert read_config(str(tmp_path))["model"]["class_groups"] == groups


def test_a_file_decides(tmp_path, digits):
    write_partition(tmp_path / "mine.json", digits, EVEN, 5, "by hand")
    trainer = Trainer(
        hydra_config(tmp_path / "run", partition=str(tmp_path / "mine.json"), epochs=1)
    )
    trainer.fit()
    assert owners(trainer) == EVEN


def test_groups_in_the_configuration_need_no_partition(tmp_path):
    trainer = Trainer(hydra_config(tmp_path, model={**MODEL, "class_groups": EVEN}, epochs=1))
    trainer.fit()
    assert owners(trainer) == EVEN
    assert not (tmp_path / "partition.json").exists()


def test_resume_takes_the_partition_of_the_checkpoint(tmp_path, monkeypatch):
    whole = Trainer(hydra_config(tmp_path / "whole", partition="auto"))
    expected = whole.fit()
    config = hydra_config(tmp_path / "parts", partition="auto")
    for step, name in ((1, "reference"), (4, "parts")):
        with monkeypatch.context() as patch:
            # The first stop is in the reference's 3 steps, the second in the network's 6.
            interrupt_at(patch, step)
            with pytest.raises(TrainingInterrupted) as stopped:
                Trainer(config).fit(resume=name == "parts")
        assert f"{name}/checkpoint.safetensors" in str(stopped.value)
        assert read_config(config.out)["partition"] == "auto"
    parts = Trainer(config)
    result = parts.fit(resume=True)
    assert owners(parts) == owners(whole)
    assert untimed(result.records) == untimed(expected.records)
    for (name, a), b in zip(
        result.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_resume_without_any_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="must name a checkpoint file"):
        Trainer(hydra_config(tmp_path, partition="auto")).fit(resume=True)


def test_learned_gates_need_no_partition():
    for gate in ("learn", "noisy_topk"):
        assert not needs_partition({**MODEL, "gate": gate})
    assert needs_partition(MODEL)
    assert not needs_partition({"family": "dvn"})
    with pytest.raises(ValueError, match="teacher_forcing_epochs must be 0 for a gate that learns"):
        TrainConfig(model={**MODEL, "gate": "learn"}, teacher_forcing_epochs=1)


def test_number_of_branches():
    assert branches_of(MODEL) == 5
    assert branches_of({"family": "hydranet_resnet"}) == 20
    with pytest.raises(ValueError, match=r"family must be one of .*, got 'hydranet_none'"):
        branches_of({"family": "hydranet_none"})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("not json", "must be a JSON object with class_groups, got another"),
        ("[1, 2]", "must be a JSON object with class_groups, got another"),
        ('{"groups": []}', "must be a JSON object with class_groups, got another"),
        ('{"class_groups": 7}', "must be a JSON object with class_groups, got another"),
        ('{"class_groups": [0, 1, 2]}', "must be 10 whole numbers, .* got 3 entries"),
        (json.dumps({"class_groups": [0.5] * 10}), "must be 10 whole numbers"),
        (json.dumps({"class_groups": [True] * 10}), "must be 10 whole numbers"),
        (json.dumps({"class_groups": [0, 1, 2, 3, 3] * 2}), r"each of the 5 branches, 0 to 4, got"),
        (json.dumps({"class_groups": [0, 1, 2, 3, 5] * 2}), r"each of the 5 branches, 0 to 4, got"),
        (json.dumps({"class_groups": EVEN, "classes": ["a"]}), "must be those of digits"),
    ],
)
def test_broken_files(tmp_path, digits, text, error):
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=error) as raised:
        read_partition(path, digits, 5)
    assert str(path) in str(raised.value)


def test_missing_file_and_reference(tmp_path, digits):
    config = hydra_config(tmp_path / "run", partition=str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"must be auto, random or a JSON file, got .*none"):
        Trainer(config).fit()
    config = hydra_config(tmp_path / "run", partition="auto", reference=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"must name a checkpoint file, got .*none"):
        Trainer(config).fit()
    with pytest.raises(ValueError, match="reference must be a classifier for auto, got None"):
        partition(hydra_config(tmp_path, partition="auto"), digits, ALONE, None)


def test_reference_of_other_classes(tmp_path, digits):
    parity = hydra_config(
        tmp_path / "parity",
        tasks=("digits:parity",),
        model={"family": "backbone", "name": "resnet8"},
    )
    Trainer(parity).fit()
    with pytest.raises(
        ValueError, match="must be a run of pyeff train on the 10 classes of digits"
    ):
        load_reference(str(tmp_path / "parity"), digits, torch.device("cpu"))
    save(build({**MODEL, "classes": 10}), tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="must be a run of pyeff train on the 10 classes"):
        load_reference(str(tmp_path / "alone.safetensors"), digits, torch.device("cpu"))


def test_more_branches_than_classes(tmp_path):
    with pytest.raises(ValueError, match="branches"):
        Trainer(hydra_config(tmp_path, model={**MODEL, "n_b": 11})).fit()
