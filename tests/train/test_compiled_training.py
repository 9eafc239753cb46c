import functools
import signal

import pytest
import torch
from torch._dynamo.utils import counters
from train.tiny import tiny_config

from pyeff.train import Trainer, TrainingInterrupted
from pyeff.train.session import Session


@pytest.fixture
def without_code_generation(monkeypatch):
    """torch.compile without inductor, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_code_generation")
def test_compiled_training_learns_what_plain_training_learns(tmp_path):
    """The same steps through torch.compile."""
    records = {}
    for compiled in (False, True):
        config = tiny_config(
            tmp_path / str(compiled), epochs=1, limit_train=96, compile=compiled, eval_every=1
        )
        records[compiled] = Trainer(config).fit().records
        assert (counters["frames"]["ok"] > 0) == compiled
    assert len(records[True]) == len(records[False]) > 0
    for plain, compiled in zip(records[False], records[True], strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-3)


def compressed_config(out, **changes):
    """Two epochs of three steps; the network gets smaller after the first."""
    settings = {
        "tasks": ("digits",),
        "model": {"family": "backbone", "backbone": "resnet8", "widths": [16, 16, 16]},
        "epochs": 2,
        "lr": 0.05,
        "compress": {"group": "auto", "rank": "auto"},
        "target_params": 0.6,
        "reload_epoch": 1,
    }
    return tiny_config(out, **{**settings, **changes})


def interrupted(config, monkeypatch):
    """Stops a run while its last step runs."""
    original = Session._update

    def update(self, batches, levels, step):
        if step == self.trainer.steps - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, batches, levels, step)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_update", update)
        with pytest.raises(TrainingInterrupted):
            Trainer(config).fit()


@pytest.mark.usefixtures("without_code_generation")
def test_a_network_is_compiled_before_and_after_it_gets_smaller(tmp_path, monkeypatch):
    plain = Trainer(compressed_config(tmp_path / "plain")).fit()
    assert counters["stats"]["unique_graphs"] == 0
    config = compressed_config(tmp_path / "compiled", compile=True)
    interrupted(config, monkeypatch)
    # One for the network and one for the smaller one, at least.
    assert counters["stats"]["unique_graphs"] >= 2
    resumed = Trainer(config).fit(resume=True)
    assert resumed.model.config["family"] == "compressed"
    assert resumed.compressed["parameters"] == plain.compressed["parameters"]
    assert resumed.compressed["channels"] == plain.compressed["channels"]
    for one, other in zip(plain.records, resumed.records, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-3)
        assert other["compression"]["parameters"] == one["compression"]["parameters"]
