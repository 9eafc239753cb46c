import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compress.sparsity_distributed_run import run

import pyeff

pytest.importorskip("torch_pruning")
HERE = Path(__file__).parent


def run_together(folder, processes):
    path = os.pathsep.join([str(HERE.parent), str(Path(pyeff.__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    out = folder / "out"
    script = [sys.executable, str(HERE / "sparsity_distributed_run.py")]
    rest = [str(processes), str(folder / "meeting"), str(out)]
    started = [
        subprocess.Popen(
            [*script, str(rank), *rest], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
    return [
        (torch.load(f"{out}.{rank}.pt"), json.loads(Path(f"{out}.{rank}.json").read_text()))
        for rank in range(processes)
    ]


def test_all_processes_take_the_step_that_one_takes(tmp_path):
    alone, statistics = run()
    (first, first_statistics), (second, second_statistics) = run_together(tmp_path, 2)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-9)
    assert first_statistics == second_statistics
    for here, there in zip(statistics, first_statistics, strict=True):
        assert here.get("live") == there.get("live")
        assert here.get("ranks") == there.get("ranks")
    assert 0.45 < statistics[1]["share"] <= 0.5
