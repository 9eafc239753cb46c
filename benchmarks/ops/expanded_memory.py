"""Peak memory of one training step of an expanded convolution: a helper of its benchmark.

    python benchmarks/ops/expanded_memory.py --case JSON --form expanded|contracted|plain

Prints how many MiB the process's largest resident size in the step is above that before it, once
libraries have been warmed up on a map of one pixel. Linux only.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_expanded_conv2d import FORMS, PLAIN, Case, step


def resident_mib(field: str) -> float:
    """Of this process, from Linux: ``VmRSS`` now, ``VmHWM`` the largest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"expanded_memory: /proc/self/status must have {field}, got none")


def main() -> None:
    """Runs the step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True, help="JSON of a Case")
    parser.add_argument("--form", required=True, choices=(*FORMS, PLAIN))
    options = parser.parse_args()
    case = Case(**json.loads(options.case))
    torch.set_num_threads(case.threads)
    expanded = case.layer("auto" if options.form == PLAIN else options.form)
    module: nn.Module = expanded.contract() if options.form == PLAIN else expanded
    step(module, replace(case, size=1, batch=1).image())()
    call = step(module, case.image())
    before = resident_mib("VmRSS")
    # Forgets the largest size so far: importing may have needed more than the step does.
    Path("/proc/self/clear_refs").write_text("5")
    call()
    print(resident_mib("VmHWM") - before)


if __name__ == "__main__":
    main()
