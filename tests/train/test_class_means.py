import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from train.tiny import tiny_config

from pyeff.checkpoint import read_archive
from pyeff.train import Trainer, evaluate, load_tasks
from pyeff.train.evaluate import LevelResult
from pyeff.train.report import print_results, train_and_report


class Always(nn.Module):
    """Says the same class for every image."""

    def __init__(self, answer):
        super().__init__()
        self.scores = nn.Parameter(torch.eye(10)[answer])

    def forward(self, x):
        return self.scores.expand(len(x), -1)


def test_mean_over_the_classes_that_have_test_images():
    (task,) = load_tasks(["digits"])
    few = torch.cat([(task.test_labels == label).nonzero()[:n, 0] for label, n in ((3, 9), (5, 1))])
    task = replace(task, test_images=task.test_images[few], test_labels=task.test_labels[few])
    found = evaluate(Always(3), [task], batch_size=4)
    assert found == {("digits", 1): 0.9}
    assert found.class_mean == {("digits", 1): 0.5}
    # An answer that no test image has counts as wrong and is no class of the mean.
    assert evaluate(Always(7), [task]).class_mean == {("digits", 1): 0.0}


def test_it_is_recorded_saved_and_resumed(tmp_path):
    config = tiny_config(
        tmp_path,
        epochs=1,
        tasks=("digits",),
        model={"family": "backbone", "backbone": "resnet8", "widths": [4, 8, 8]},
    )
    result = train_and_report(config)
    mean = result.accuracy.class_mean["digits", 1]
    assert result.records[-1]["test_class_mean"] == mean
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["class_mean"] == mean
    again = Trainer(config).fit(resume=True)
    assert again.accuracy.class_mean == result.accuracy.class_mean
    _, meta = read_archive(tmp_path / "checkpoint.safetensors")
    assert meta["accuracy"][0]["class_mean"] == mean


@pytest.mark.parametrize(("mean", "shown"), [(0.8, True), (0.9, False), (None, False)])
def test_it_is_printed_where_it_is_another_number(mean, shown):
    line = LevelResult("letters", 1, 0.9, 10, 20, 30, 40, class_mean=mean)
    console = Console(file=io.StringIO(), width=80)
    print_results([line], console)
    words = "mean over the classes, letters: level 1 80.00%"
    assert (words in console.file.getvalue()) is shown
