import functools
import json

import pytest
import torch
from torch._dynamo.utils import counters
from train.hydra_tiny import hydra_config
from typer.testing import CliRunner

from pyeff.cli.main import app
from pyeff.train import Trainer


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch):
    """The same steps through torch.compile, without what takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_training_learns_what_plain_training_learns(tmp_path):
    records = {}
    for compiled in (False, True):
        config = hydra_config(tmp_path / str(compiled), epochs=1, compile=compiled, eval_every=1)
        records[compiled] = Trainer(config).fit().records
        assert (counters["frames"]["ok"] > 0) == compiled
    assert not counters["graph_break"]
    assert len(records[True]) == len(records[False]) == 1
    (plain,), (compiled,) = records[False], records[True]
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-3)
    assert compiled["gate"]["train"].keys() == plain["gate"]["train"].keys()


def test_the_command_compiles(tmp_path):
    short = ("--epochs", "1", "--batch-size", "32", "--limit-train", "96", "--limit-test", "64")
    tiny = ("--n-b", "5", "--k", "2", "--w-s", "0.25", "--w-b", "0.25", "-d", "1")
    arguments = ("--partition", "random", "--compile", "--device", "cpu", "--out", str(tmp_path))
    result = CliRunner().invoke(app, ["train", "hydranet", *short, *tiny, *arguments])
    assert result.exit_code == 0, result.output
    assert counters["frames"]["ok"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["compile"] is True
