"""Runs a training script that torchrun started, and looks at what it leaves behind.

A thread of gloo that outlives the training may abort the process while Python shuts down, once in
some hundred runs: too rarely for a test of the exit code.
"""

import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
left = [name for name in threads if "gloo" in name]
assert not left, f"threads of the group of processes must have ended, got {left}"
