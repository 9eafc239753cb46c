"""What nvcc makes of csrc/cuda: registers, spills and static shared memory of every kernel.

``python tests/simt/nvcc_kernels.py`` compiles all of it for the architectures of CMakeLists.txt and
records what it finds in ``nvcc_budget.json``; ``test_nvcc.py`` compares what sm_80 takes with that.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = HERE / "nvcc_budget.json"
# A budget leaves room for another version of the compiler.
SLACK_REGISTERS = 8


class Kernel(NamedTuple):
    """One instantiation for one architecture."""

    name: str
    architecture: str
    registers: int
    spilled: int  # bytes
    shared: int  # static, in bytes


class Compiled(NamedTuple):
    """One source."""

    kernels: list[Kernel]
    seconds: float  # of one core


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def architectures() -> list[str]:
    """As CMake has them: 80-real, 80-virtual."""
    text = (ROOT / "CMakeLists.txt").read_text()
    return re.search(r'set\(PYEFF_CUDA_ARCHITECTURES "([^"]*)"', text).group(1).split(";")


def code_flags(names: Sequence[str]) -> list[str]:
    flags = []
    for name in names:
        number, kind = name.split("-")
        code = f"sm_{number}" if kind == "real" else f"compute_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def kernel_name(entry: str) -> str:
    """Of an entry function, which older compilers report as the linker sees it."""
    if not entry.startswith("_Z"):
        return re.search(r"\w+_kernel\b", entry).group()
    # Each name follows its length, which may follow other digits. An anonymous namespace has a
    # hash, of which a number may reach to the end of the kernel's name too: the shortest.
    names = [entry[m.end(1) : m.end(1) + int(m.group(1))] for m in re.finditer(r"(?=(\d+))", entry)]
    kernels = [name for name in names if name.endswith("_kernel")]
    if not kernels:
        raise ValueError(f"no kernel in {entry}")
    return min(kernels, key=len)


def parse(report: str) -> list[Kernel]:
    """The kernels that ``-Xptxas -v`` speaks of."""
    kernels = []
    name = architecture = ""
    spilled = 0
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(.*)' for '(\w+)'", line):
            name, architecture = kernel_name(entry.group(1)), entry.group(2)
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spills.group(1)) + int(spills.group(2))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            size = int(shared.group(1)) if shared else 0
            kernels.append(Kernel(name, architecture, int(used.group(1)), spilled, size))
    return kernels


def compiled(source: Path, names: Sequence[str], nvcc: str = "nvcc") -> Compiled:
    """Raises RuntimeError with the compiler's words where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v", *code_flags(names)]
        command += ["-I", str(ROOT / "csrc"), "-c", str(source), "-o", f"{folder}/object.o"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        report = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{report}")
    return Compiled(parse(report), usage.ru_utime + usage.ru_stime)


def compile_all(names: Sequence[str], nvcc: str = "nvcc") -> dict[str, Compiled]:
    """Every source by its name, for these architectures, two at a time."""
    files = sources()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda source: compiled(source, names, nvcc), files)
        return {file.name: result for file, result in zip(files, results, strict=True)}


def most(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """For each kernel the largest numbers of its instantiations on any architecture."""
    found: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        entry = found.setdefault(kernel.name, {"registers": 0, "shared": 0})
        entry["registers"] = max(entry["registers"], kernel.registers)
        entry["shared"] = max(entry["shared"], kernel.shared)
    return dict(sorted(found.items()))


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """What is recorded of a source; ``spilled`` is of all its kernels on all architectures."""
    return {"spilled": sum(kernel.spilled for kernel in kernels), "kernels": most(kernels)}


def main() -> None:
    results = compile_all(architectures())
    record = {name: summary(result.kernels) for name, result in results.items()}
    for name, (kernels, seconds) in results.items():
        spilled = record[name]["spilled"]
        print(f"{name}: {len(kernels)} kernels, {spilled} bytes spilled, {seconds:.1f} s")
    fresh = BUDGET.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(fresh, BUDGET)


if __name__ == "__main__":
    main()
