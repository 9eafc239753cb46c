import json

import pytest
import torch
from train.together import launch, run

SCRIPT = "distributed_run.py"


@pytest.mark.parametrize("rule", ["sum joint", "sandwich alternate"])
def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path, rule):
    alone, meta = run(SCRIPT, tmp_path / "one", rule, processes=1)
    together, joint_meta = run(SCRIPT, tmp_path / "two", rule, processes=2)
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                together[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif name != "random.cpu":
            assert torch.equal(together[name], tensor), name
    for mine, theirs in zip(meta["records"], joint_meta["records"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-9)
        assert theirs["test_accuracy"] == pytest.approx(mine["test_accuracy"], abs=1e-6)


def test_an_error_of_the_first_process_ends_the_others_too(tmp_path):
    launch("first_fails_run.py", tmp_path, processes=2)
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == {"made": "a network", "error": "ValueError: no channel left"}
    assert other == {
        "made": None,
        "error": "RuntimeError: the first process failed: ValueError: no channel left",
    }
