"""One process's training beside that of several."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pyeff
from pyeff.checkpoint import read_archive

HERE = Path(__file__).parent
LEAVING = HERE / "run_and_leave.py"


def run(script, out, *words, processes):
    """The checkpoint of a training script of this folder: tensors, and what is noted with them.

    Alone it runs in this process: starting one takes longer than the training.
    """
    if processes == 1:
        path = str(HERE / script)
        with mock.patch.object(sys, "argv", [path, str(out), *words]):
            runpy.run_path(path)
    else:
        launch(script, out, *words, processes=processes)
    return read_archive(out / "checkpoint.safetensors")


def launch(script, out, *words, processes):
    """Runs a script of this folder in several processes, which must end well."""
    folders = [str(HERE.parent), str(Path(pyeff.__file__).parents[1])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, str(LEAVING), str(HERE / script), str(out), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
