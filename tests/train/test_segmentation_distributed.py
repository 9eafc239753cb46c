import pytest
import torch
from train.together import run

SCRIPT = "segmentation_distributed_run.py"


def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path):
    """Both stages: the loss's denominator, batch statistics, the shares of an odd test set."""
    alone, meta = run(SCRIPT, tmp_path / "one", processes=1)
    together, joint_meta = run(SCRIPT, tmp_path / "two", processes=2)
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[name], tensor, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in zip(meta["records"], joint_meta["records"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-9)
        assert theirs["val_miou"] == pytest.approx(mine["val_miou"], abs=1e-9)
