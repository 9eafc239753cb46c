"""Two processes, of which the first makes something, or fails; started by test_distributed.py."""

import json
import sys
from pathlib import Path

from pyeff.train.processes import joined


def fail():
    raise ValueError("no channel left")


with joined("cpu") as processes:
    told = {"made": processes.by_first(lambda: "a network")}
    try:
        processes.by_first(fail)
    except (ValueError, RuntimeError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1], f"{processes.rank}.json").write_text(json.dumps(told))
