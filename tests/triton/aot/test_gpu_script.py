"""The parts of `make gpu` that can be run where there is no GPU."""

import importlib
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pyeff.ops import _dispatch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "ops")]
gpu = importlib.import_module("gpu")
gpu_rows = importlib.import_module("gpu_rows")
bench = importlib.import_module("gpu_nested_conv2d")
branch_bench = importlib.import_module("gpu_branch_conv2d")
pair_bench = importlib.import_module("gpu_factorized_conv2d")

pytestmark = pytest.mark.aot

MACHINE = {"device": "a device", "torch": "2.11.0"}
TIMES = {"cold": 0.0125, "low": 0.01, "high": 0.02, "wall": 0.03}


def python(*lines):
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_device_it_says_so_and_fails(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr


def test_a_stage_keeps_the_end_of_the_output_and_the_exit_code():
    assert gpu.run_stage("fine", python("print('hello')"), 60).ok
    failed = gpu.run_stage("bad", python("print('seen')", "raise SystemExit(3)"), 60)
    assert not failed.ok
    assert "seen" in failed.output
    assert "exit code 3" in failed.output


def is_running(pid):
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_stage_is_stopped_at_its_limit_with_its_children():
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parent = ["import subprocess, sys, time", f"print({child}.pid, flush=True)", "time.sleep(600)"]
    stage = gpu.run_stage("slow", python(*parent), 5.0)
    assert not stage.ok
    assert stage.seconds < 60
    assert "stopped after 5 s" in stage.output
    end = time.monotonic() + 30
    while is_running(stage.output.split()[0]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(stage.output.split()[0])


@pytest.mark.parametrize(
    ("lines", "seconds", "verdict"),
    [
        ("exit 0", 60, "ok"),
        ("exit 9", 60, "FAILED"),
        ("sleep 60", 2, "skipped"),
        (None, 60, "skipped"),
    ],
    ids=["nothing found", "an error found", "too slow", "not there"],
)
def test_memcheck_tells_what_it_found(monkeypatch, tmp_path, lines, seconds, verdict):
    if lines is not None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\necho sanitizing $@\n{lines}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stage = gpu.memcheck(tmp_path, seconds)
    assert gpu.verdict(stage.ok, stage.skipped) == verdict
    if lines is not None:
        assert "--tool memcheck" in stage.output
        assert "gpu_memcheck.py" in stage.output


def test_the_build_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "BUILD_TOOLS", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    stage = gpu.build(tmp_path / "site", tmp_path / "tools", 60)
    assert not stage.ok
    assert "the build needs no-such-package" in stage.output


def test_the_parts_of_the_tests_are_all_of_them(tmp_path):
    lines = ["import pytest", "@pytest.mark.parametrize('n', range(5))", "def test(n): pass"]
    (tmp_path / "test_five.py").write_text("\n".join(lines))
    seen = []
    for part in range(2):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "gpu_shard", "--part", f"{part}/2"]
        environment = {"PYTHONPATH": gpu.python_path(BENCHMARKS)}
        stage = gpu.run_stage("part", command, 60, cwd=tmp_path, environment=environment)
        assert stage.ok
        seen.append(sorted(re.findall(r"test\[(\d)\] PASSED", stage.output)))
    assert seen == [["0", "2", "4"], ["1", "3"]]


def report(results):
    stage = gpu.Stage("tests", False, 12.3, "")
    return {"machine": MACHINE, "stages": [asdict(stage)], "results": results}


def test_the_page_without_results_names_the_failed_stage():
    page = gpu.markdown(report({}))
    assert "| tests | FAILED | 12 |" in page
    assert "dtype" not in page


def page_of(module, name):
    """The page for one measured row and one that was missed, and that row's line."""
    first, second = list(module.problems())[:2]
    row = {
        **first._asdict(),
        "layer": None if name == "nested_conv2d" else module.LAYERS[0]._asdict(),
        "times_ms": {"triton": TIMES, "triton, graph": TIMES},
        "ratio_to_strongest": 1.5,
        "ratio_graphs": 2.5,
        "tflop_per_s": 7.0,
    }
    rates = {"matmul_tflop_per_s": {"bf16": 700.0}, "not_measured": [second._asdict()]}
    page = gpu.markdown(report({name: {**rates, "rows": [row]}}))
    (line,) = [line for line in page.splitlines() if "0.0125 (0.0300)" in line]
    return page, line


@pytest.mark.parametrize(
    "module", [bench, branch_bench, pair_bench], ids=["nested", "branch", "factorized"]
)
def test_the_page_has_one_line_a_row_and_says_what_is_not_measured(module):
    name = module.__name__.removeprefix("gpu_")
    page, line = page_of(module, name)
    assert line.count("| -") == len(gpu.CANDIDATES[name]) - 2
    assert line.endswith("| 1.50 | 2.50 | 7 |")
    heading = next(text for text in page.splitlines() if "x strongest" in text)
    assert line.count("|") == heading.count("|")
    starts = {
        "nested_conv2d": "| 256 |",
        "branch_conv2d": "| first, strided | 32 -> 64 |",
        "factorized_conv2d": "| 64 channels | 128 x 256 | 1 |",
    }
    assert line.startswith(starts[name])
    assert "1 rows were not measured" in page


SMALL = [bench.Problem(8, 5, 0.5, 2, "tf32", training) for training in (False, True)]
SMALL += [
    branch_bench.Problem(layer, 6, 3, "tf32", training)
    for layer in (
        branch_bench.Layer("first", 4, 6, 6, 3, 2, True),
        branch_bench.Layer("later", 5, 3, 4, 3, 1, False),
    )
    for training in (False, True)
]
SMALL += [
    pair_bench.Problem(pair_bench.Layer("pair", 6, 5, 7, 2), 2, "tf32", training)
    for training in (False, True)
]


def module_of(problem):
    return next(m for m in (bench, branch_bench, pair_bench) if isinstance(problem, m.Problem))


def described(problem):
    kind = "nested" if module_of(problem) is bench else problem.layer.name
    return f"{kind}-{'training' if problem.training else 'forward'}"


@pytest.mark.parametrize("problem", SMALL, ids=described)
def test_every_candidate_computes_the_same(problem):
    module = module_of(problem)
    inputs = module.make_inputs(problem, "cpu")
    expected = module.expected_results(problem, inputs)
    candidates = module.eager_candidates(problem, inputs)
    gradients = 5 if module is pair_bench else 3
    assert len(expected) == (1 + gradients if problem.training else 1)
    for name, call in candidates.items():
        module.verify(problem, name, call(), expected)


@pytest.mark.parametrize("problem", SMALL, ids=described)
def test_verification_refuses_a_wrong_candidate(problem):
    module = module_of(problem)
    inputs = module.make_inputs(problem, "cpu")
    expected = module.expected_results(problem, inputs)
    wrong = list(module.eager_candidates(problem, inputs).values())[1]()
    results = wrong if isinstance(wrong, list) else [wrong]
    results[-1] = results[-1] * 1.01
    with pytest.raises(RuntimeError, match="broken is wrong on"):
        module.verify(problem, "broken", results, expected)
    results[-1] = torch.full_like(results[-1], float("nan"))
    with pytest.raises(RuntimeError, match="broken is wrong on"):
        module.verify(problem, "broken", results, expected)


def test_problems_are_those_of_the_plan():
    every = list(bench.problems())
    assert len(set(every)) == len(every) == 3 * 3 * 3 * 3 * 2
    assert sum(problem.with_compile for problem in every) == 6
    one = bench.Problem(64, 56, 0.5, 2, "fp16", False)
    assert one.flop == 2 * (2 * 56 * 56) * 32 * 32 * 9
    assert one._replace(training=True).flop == 3 * one.flop
    every = list(branch_bench.problems())
    assert len(set(every)) == len(every) == 3 * 2 * 3 * 2 * len(branch_bench.LAYERS)
    one = branch_bench.Problem(branch_bench.LAYERS[0], 20, 2, "fp16", False)
    assert one.flop == 2 * (2 * 4 * 8 * 8) * 32 * 64 * 9
    assert one._replace(training=True).flop == 3 * one.flop
    every = list(pair_bench.problems())
    assert len(set(every)) == len(every) == 2 * 3 * 2 * len(pair_bench.LAYERS)
    assert sum(map(pair_bench.with_compile, every)) == 4
    one = pair_bench.Problem(pair_bench.LAYERS[0], 2, "fp16", False)
    assert one.flop == 2 * 2 * (2 * 128 * 256) * 64 * 64 * 3
    assert one._replace(training=True).flop == 3.5 * one.flop


def test_every_operator_has_a_script_a_table_and_a_time():
    assert len(gpu.PARTS) == len(gpu.CANDIDATES)
    for name in gpu.CANDIDATES:
        assert (BENCHMARKS / "ops" / f"gpu_{name}.py").exists()
        assert gpu.LIMITS[name] > 60
        assert gpu.PROBLEM[name]


class Time(NamedTuple):
    cold: float
    wall: float = 0.0


def test_a_row_compares_the_fastest_of_ours_with_the_fastest_of_the_others():
    cold = {
        "triton": 4.0,
        "cuda": 3.0,
        "sliced": 6.0,
        "compiled": 5.0,
        "triton, graph": 1.0,
        "cuda, graph": 2.0,
        "sliced, graph": 3.0,
    }
    found = gpu_rows.summary(2e9, {name: Time(value) for name, value in cold.items()})
    assert found["ratio_to_strongest"] == 5 / 3
    assert found["ratio_graphs"] == 3.0
    assert found["tflop_per_s"] == 2.0
    assert found["times_ms"]["cuda"] == {"cold": 3.0, "wall": 0.0}


def test_own_kernels_run_on_their_backends(monkeypatch):
    monkeypatch.setattr(gpu_rows.pyeff, "info", lambda: {"cuda": {"built": True}})
    calls = gpu_rows.own(_dispatch.forced_backend)
    assert {name: call() for name, call in calls.items()} == {"triton": "triton", "cuda": "cuda"}
    monkeypatch.setattr(gpu_rows.pyeff, "info", lambda: {"cuda": {"built": False}})
    assert list(gpu_rows.own(_dispatch.forced_backend)) == ["triton"]
