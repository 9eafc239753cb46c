"""What compute-sanitizer is given on a GPU: it runs, and every kernel is in it."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (
    "branch_conv2d",
    "branch_stage",
    "combine",
    "factorized_conv2d",
    "nested_conv2d",
    "top_k_routes",
)


def script():
    path = ROOT / "benchmarks" / "gpu_memcheck.py"
    spec = importlib.util.spec_from_file_location("gpu_memcheck", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_launched(simt, capsys):
    script().run_all("cpu")
    names = {launch["name"] for launch in simt.launches()}
    known = set()
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        known |= set(re.findall(r'launch\(\s*"(\w+)"', path.read_text()))
    assert known
    assert sorted(known - names) == []
