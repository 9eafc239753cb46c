import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyeff
from pyeff.checkpoint import read_archive

HERE = Path(__file__).parent


def run(out, processes):
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    count = [] if processes == 1 else [f"--nproc-per-node={processes}"]
    path = os.pathsep.join([str(HERE.parent), str(Path(pyeff.__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    script = str(HERE / "segmentation_distributed_run.py")
    done = subprocess.run(
        [sys.executable, *launcher, *count, script, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_archive(out / "checkpoint.safetensors")


def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path):
    """Both stages: the loss's denominator, batch statistics, the shares of an odd test set."""
    alone, meta = run(tmp_path / "one", 1)
    together, joint_meta = run(tmp_path / "two", 2)
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[name], tensor, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in zip(meta["records"], joint_meta["records"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-9)
        assert theirs["val_miou"] == pytest.approx(mine["val_miou"], abs=1e-9)
