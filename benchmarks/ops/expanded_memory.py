"""Peak memory of one training step of an expanded convolution: a helper of its benchmark.

    python benchmarks/ops/expanded_memory.py --case JSON --form expanded|contracted|plain

Prints by how many MiB the step raised the process's largest resident size, once libraries have
been warmed up on a map of one pixel.
"""

import argparse
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_expanded_conv2d import FORMS, PLAIN, Case, step


def resident_mib() -> float:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    x = case.image()
    before = resident_mib()
    step(module, x)()
    print(resident_mib() - before)


if __name__ == "__main__":
    main()
