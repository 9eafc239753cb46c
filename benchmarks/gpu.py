"""What `make gpu` runs: build, test and measure pyeff on a machine with an NVIDIA GPU.

    python benchmarks/gpu.py --out FOLDER

Uses the Python, torch, Triton and nvcc that are there; needs no network and no virtual
environment, and is over in nine minutes. Writes FOLDER/gpu.json and FOLDER/gpu.md, whatever
happens; the exit code is 0 only if every stage succeeded. Build tools that Python lacks
(scikit-build-core, pybind11) are taken from wheels in the folder .whl, if there are any.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import markdown_table, write_text

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 510.0
LIMITS = {
    "build": 150.0,
    "tests": 240.0,
    "memcheck": 45.0,
    "nested_conv2d": 200.0,
    "branch_conv2d": 140.0,
    "factorized_conv2d": 110.0,
}
# What part of the time that is left each benchmark may take; the last one takes the rest.
PARTS = (0.45, 0.5, 1.0)
BUILD_TOOLS = {"scikit_build_core": "scikit-build-core", "pybind11": "pybind11"}
CANDIDATES = {
    "nested_conv2d": (
        "triton",
        "cuda",
        "sliced",
        "cached slice",
        "compiled",
        "triton, graph",
        "cuda, graph",
        "cached slice, graph",
        "sliced, graph",
    ),
    "branch_conv2d": (
        "triton",
        "cuda",
        "gathered",
        "loop",
        "dense",
        "triton, graph",
        "cuda, graph",
        "gathered, graph",
        "dense, graph",
    ),
    "factorized_conv2d": (
        "triton",
        "cuda",
        "eager",
        "compiled",
        "triton, graph",
        "cuda, graph",
        "eager, graph",
    ),
}
PROBLEM = {
    "nested_conv2d": ("channels", "pixels", "level", "batch", "dtype", "direction"),
    "branch_conv2d": ("layer", "channels", "pixels", "B", "batch", "dtype", "direction"),
    "factorized_conv2d": ("layer", "pixels", "batch", "dtype", "direction"),
}


# compute-sanitizer's exit code where it finds an error.
FOUND = 9


@dataclass
class Stage:
    """How one stage went; ``output`` is the end of what it printed."""

    name: str
    ok: bool
    seconds: float
    output: str
    stopped: bool = False  # at its limit
    skipped: bool = False  # nothing is known from it


def run_stage(
    name: str,
    command: Sequence[str],
    seconds: float,
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Stage:
    """Runs a command for at most ``seconds``, shows its output and keeps the end of it."""
    print(f"== {name}: at most {seconds:.0f} s", flush=True)
    start, stopped = time.monotonic(), False
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.0))
            note = "" if code == 0 else f"\n{name} ended with exit code {code}\n"
        except subprocess.TimeoutExpired:
            # The whole session of processes that it started, compilers and workers too.
            os.killpg(process.pid, signal.SIGKILL)
            code, note = process.wait(), f"\n{name} was stopped after {seconds:.0f} s\n"
            stopped = True
        log.seek(0)
        output = log.read() + note
    print(output[-6000:], flush=True)
    seconds = round(time.monotonic() - start, 1)
    return Stage(name, code == 0, seconds, output[-6000:], stopped=stopped)


def missing_tools() -> list[str]:
    """Names, as pip knows them, of what a build needs beside this Python's packages."""

    def has_module(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    missing = [pip for module, pip in BUILD_TOOLS.items() if not has_module(module)]
    # cmake and ninja also come as Python packages, which scikit-build-core finds.
    missing += [t for t in ("cmake", "ninja") if not shutil.which(t) and not has_module(t)]
    return missing + [tool for tool in ("nvcc",) if not shutil.which(tool)]


def path_with_nvcc() -> str:
    """PATH with the usual place of the CUDA toolkit, if nvcc is not found without it."""
    path = os.environ.get("PATH", os.defpath)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not shutil.which("nvcc") and Path(home, "bin", "nvcc").exists():
        path = os.pathsep.join((path, str(Path(home, "bin"))))
    return path


def build(target: Path, tools: Path, seconds: float) -> Stage:
    """Builds pyeff with CUDA for this GPU and installs it into the folder ``target``."""
    wheels = sorted(str(wheel) for wheel in (ROOT / ".whl").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    if wheels and missing_tools():
        found = run_stage("build tools", [*pip, "--target", str(tools), *wheels], seconds / 2)
        if not found.ok:
            return found
        sys.path.insert(0, str(tools))
        importlib.invalidate_caches()
    missing = missing_tools()
    if missing:
        message = (
            f"the build needs {', '.join(missing)}, and this machine has none. Python packages "
            "can be brought along as wheels in a folder .whl beside pyproject.toml"
        )
        print(message, flush=True)
        return Stage("build", False, 0.0, message)
    major, minor = torch.cuda.get_device_capability()
    command = [*pip, "--no-build-isolation", "--target", str(target)]
    command += ["-C", "cmake.define.PYEFF_CUDA=ON", "-C", f"build-dir={tools / 'build'}"]
    command += ["-C", f"cmake.define.PYEFF_CUDA_ARCHITECTURES={major}{minor}-real", str(ROOT)]
    return run_stage("build", command, seconds, environment={"PYTHONPATH": python_path(tools)})


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders first."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*(str(folder) for folder in folders), *([before] if before else [])])


def test(target: Path, seconds: float) -> Stage:
    """Runs the tests that need a GPU on the installed package, in several processes."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--rootdir", str(ROOT)]
    command += ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests"), "-p", "gpu_shard"]
    # From the target's folder: the working tree's own pyeff has no extension module.
    environment = {"PYTHONPATH": python_path(target, ROOT / "benchmarks")}
    parts = max(1, min(8, (os.cpu_count() or 1) // 2))

    def run(part: int) -> Stage:
        name, share = f"tests, part {part + 1} of {parts}", ["--part", f"{part}/{parts}"]
        return run_stage(name, [*command, *share], seconds, cwd=target, environment=environment)

    with ThreadPoolExecutor(parts) as pool:
        stages = list(pool.map(run, range(parts)))
    return Stage(
        "tests",
        all(stage.ok for stage in stages),
        max(stage.seconds for stage in stages),
        "".join(stage.output for stage in stages),
    )


def memcheck(target: Path, seconds: float) -> Stage:
    """Looks for reads and writes beside the memory of small calls, where compute-sanitizer runs.

    Not run to its end, it has found nothing and cleared nothing: it counts as skipped.
    """
    name, tool = "memcheck", shutil.which("compute-sanitizer")
    if tool is None:
        message = "compute-sanitizer is not on this machine's PATH\n"
        print(f"== {name}: {message}", flush=True)
        return Stage(name, True, 0.0, message, skipped=True)
    # API errors are those of torch, which asks for functions that may not be there.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no"]
    command += ["--error-exitcode", str(FOUND)]
    command += [sys.executable, str(ROOT / "benchmarks" / "gpu_memcheck.py")]
    # Of torch's cache of memory everything can be read.
    environment = {"PYTHONPATH": python_path(target), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    stage = run_stage(name, command, seconds, cwd=target, environment=environment)
    return replace(stage, ok=True, skipped=True) if stage.stopped else stage


def measure(target: Path, name: str, path: Path, seconds: float) -> Stage:
    """Runs an operator's benchmark; it ends by itself a little before its limit."""
    script = ROOT / "benchmarks" / "ops" / f"gpu_{name}.py"
    command = [sys.executable, str(script), "--json", str(path)]
    command += ["--seconds", f"{max(seconds - 40.0, 1.0):.0f}"]
    return run_stage(
        name, command, seconds, cwd=target, environment={"PYTHONPATH": python_path(target)}
    )


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": module_version("triton"),
        "nvcc": last_line("nvcc", "--version"),
        "python": sys.version.split()[0],
        "commit": last_line("git", "rev-parse", "HEAD"),
    }


def last_line(*command: str) -> str:
    """The last line that a command prints, "unknown" where it cannot be run."""
    if not shutil.which(command[0]):
        return "unknown"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("\n")[2] or "unknown"


def module_version(name: str) -> str:
    """Version of an installed package, "none" without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def verdict(ok: bool, skipped: bool) -> str:
    """How a stage went, in a word."""
    return "skipped" if skipped else "ok" if ok else "FAILED"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: machine, stages, one table of times an operator."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    stages = [
        (stage["name"], verdict(stage["ok"], stage["skipped"]), f"{stage['seconds']:.0f}")
        for stage in report["stages"]
    ]
    page = f"# pyeff on {report['machine'].get('device', 'no GPU')}\n\n{machine}\n\n"
    page += markdown_table(("stage", "result", "seconds"), stages)
    if not report["results"]:
        return page
    rates = next(iter(report["results"].values()))["matmul_tflop_per_s"]
    page += (
        "\nMilliseconds on the device from a cold L2 cache, median; in brackets per call in a row "
        "of calls on the host's clock. Every candidate was compared with float64 first. The "
        "last columns: the fastest other candidate without a graph over the faster of our two "
        "(triton, cuda), the same for the graphs, and our rate in the graph. 8192 x 8192 matrix "
        "products here reach, in TFLOP/s: "
        f"{', '.join(f'{k} {v:.0f}' for k, v in rates.items())}.\n"
    )
    for name, results in report["results"].items():
        columns = [*PROBLEM[name], *CANDIDATES[name], "x strongest", "x graph", "TFLOP/s"]
        rows = [table_row(name, row) for row in results["rows"]]
        page += f"\n## {name}\n\n{markdown_table(columns, rows)}"
        if results["not_measured"]:
            page += f"\n{len(results['not_measured'])} rows were not measured for lack of time.\n"
    return page


def table_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """The cells of one row; "-" where a candidate does not apply."""
    direction = "forward + backward" if row["training"] else "forward"
    if name == "nested_conv2d":
        cells = [str(row["channels"]), str(row["pixels"]), f"{100 * row['level']:.0f} %"]
    elif name == "factorized_conv2d":
        layer = row["layer"]
        cells = [layer["name"], f"{layer['height']} x {layer['width']}"]
    else:
        layer = row["layer"]
        cells = [layer["name"], f"{layer['inputs']} -> {layer['outputs']}", str(layer["pixels"])]
        cells.append(str(row["branches"]))
    cells += [str(row["batch"]), row["dtype"], direction]
    for candidate in CANDIDATES[name]:
        times = row["times_ms"].get(candidate)
        cells.append(f"{times['cold']:.4f} ({times['wall']:.4f})" if times else "-")
    cells += [f"{row['ratio_to_strongest']:.2f}", f"{row['ratio_graphs']:.2f}"]
    return [*cells, f"{row['tflop_per_s']:.0f}"]


def run_all(out: Path) -> list[Stage]:
    """Every stage after the other within the total time; the report after each of them."""
    end = time.monotonic() + TOTAL_SECONDS
    os.environ["PATH"] = path_with_nvcc()
    machine = describe_machine()
    stages: list[Stage] = []

    def left(name: str) -> float:
        return min(LIMITS[name], end - time.monotonic())

    with tempfile.TemporaryDirectory(prefix="pyeff-gpu-") as temporary:
        target = Path(temporary, "site")
        files = {name: Path(temporary, f"{name}.json") for name in CANDIDATES}
        target.mkdir()

        def report() -> None:
            page = {
                "machine": machine,
                "stages": [asdict(stage) for stage in stages],
                "results": {
                    name: json.loads(file.read_text())
                    for name, file in files.items()
                    if file.exists()
                },
            }
            write_text(out / "gpu.json", json.dumps(page, indent=1) + "\n")
            write_text(out / "gpu.md", markdown(page))

        stages.append(build(target, Path(temporary, "tools"), left("build")))
        report()
        if stages[-1].ok:
            stages.append(test(target, left("tests")))
            report()
            for name, part in zip(files, PARTS, strict=True):
                rest = end - LIMITS["memcheck"] - time.monotonic()
                seconds = min(LIMITS[name], part * rest)
                stages.append(measure(target, name, files[name], seconds))
                report()
            stages.append(memcheck(target, left("memcheck")))
            report()
    return stages


def main() -> None:
    """Exit code 0 only if the package was built, all tests passed and all rows were verified."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        sys.exit(
            "make gpu: needs a CUDA device, and torch "
            f"{torch.__version__} sees none on this machine; `make test` needs no GPU"
        )
    stages = run_all(out)
    for stage in stages:
        print(f"{stage.name}: {verdict(stage.ok, stage.skipped)} in {stage.seconds:.0f} s")
    print(f"written: {out / 'gpu.json'} and {out / 'gpu.md'}")
    sys.exit(0 if all(stage.ok for stage in stages) else 1)


if __name__ == "__main__":
    main()
