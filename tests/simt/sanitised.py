"""Runs tests of this folder on kernels built with the address and undefined-behaviour sanitizers.

``python tests/simt/sanitised.py tests/simt/test_simt_probe.py -k copies``: a process of its own,
because the sanitizer's library has to be loaded before everything else.
"""

import os
import subprocess
import sys

from simt_build import COMPILER, ROOT

VARIABLE = "PYEFF_SIMT_SANITISED"


def _library(name: str) -> str:
    return subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments on sanitised kernels; what it printed is in ``stdout``."""
    environment = {
        **os.environ,
        VARIABLE: "1",
        # libstdc++ comes along: without it the sanitizer does not find what throws.
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    result = run(sys.argv[1:])
    print(result.stdout)
    sys.exit(result.returncode)
