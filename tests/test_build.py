"""What the build promises: no libtorch inside, and a clear word where CUDA cannot be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "nm", "ninja", "sh", "uname")


def test_extension_links_no_torch():
    code = "import torch, pyeff._C; print(pyeff._C.__file__)"
    file = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    # Names alone: an address may well hold "c10".
    linked = " ".join(line.split()[0] for line in lines.splitlines() if line.split())
    assert "libc.so" in linked
    for name in ("torch", "c10", "cudart", "cublas"):
        assert name not in linked


def test_cuda_on_without_nvcc_says_what_is_missing(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake on PATH")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    done = subprocess.run(
        [
            cmake,
            *("-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build")),
            "-DPYEFF_CUDA=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "HOME": os.fspath(tmp_path)},
    )
    assert done.returncode != 0
    assert "PYEFF_CUDA=ON needs nvcc" in " ".join(done.stderr.split())
