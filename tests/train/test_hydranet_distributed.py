import pytest
import torch
from train.together import run

SCRIPT = "hydranet_distributed_run.py"


def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path):
    """Reference classifier, partition, statistics of each branch's batch norm, gate's counts."""
    alone, meta = run(SCRIPT, tmp_path / "one", processes=1)
    together, joint_meta = run(SCRIPT, tmp_path / "two", processes=2)
    assert joint_meta["model"]["class_groups"] == meta["model"]["class_groups"]
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                together[name], tensor, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif name != "random.cpu":
            assert torch.equal(together[name], tensor), name
    (mine,), (theirs,) = meta["records"], joint_meta["records"]
    assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-9)
    assert theirs["test_accuracy"] == pytest.approx(mine["test_accuracy"], abs=1e-6)
    assert theirs["gate"] == mine["gate"]
