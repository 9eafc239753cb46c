import functools

import pytest
import torch
from torch._dynamo.utils import counters
from train.tiny import tiny_config

from pyeff.train import Trainer


def test_compiled_training_learns_what_plain_training_learns(tmp_path, monkeypatch):
    """The same steps through torch.compile, without its code generation, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    records = {}
    for compiled in (False, True):
        config = tiny_config(
            tmp_path / str(compiled), epochs=1, limit_train=96, compile=compiled, eval_every=1
        )
        records[compiled] = Trainer(config).fit().records
        assert (counters["frames"]["ok"] > 0) == compiled
    torch._dynamo.reset()
    assert len(records[True]) == len(records[False]) > 0
    for plain, compiled in zip(records[False], records[True], strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-3)
