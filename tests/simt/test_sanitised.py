"""Some of these tests on kernels built with sanitizers: no access outside, nothing undefined."""

import platform
import shutil

import pytest
from sanitised import run
from simt_build import COMPILER, HERE

# A few cases of every kernel, with ragged tiles; ``sanitised.py`` runs any others by hand.
CASES = {
    "probe": "right_kernel",
    "nested_conv2d": "shares_of_the_sum and float16 and True",
    "branch_conv2d": "in_other_precisions and float16 and (small or stride or wide)",
    "branch_stage": "matches_reference and float16 and (option or uneven or silu or crossing)",
    "combine": "matches_reference and float16 and (equal or cifar)",
    "factorized_conv2d": "in_half_precision and float16 and (small or dilated or panel or wide)",
    "top_k_routes": "plan or matches_reference and float16",
}


def sanitised(*arguments):
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER} on x86-64")
    return run(list(arguments))


def test_kernels_stay_within_their_memory():
    files = [str(HERE / f"test_simt_{name}.py") for name in CASES]
    subset = " or ".join(f"test_simt_{name} and ({cases})" for name, cases in CASES.items())
    result = sanitised(*files, "-k", subset)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_a_write_beyond_shared_memory_ends_the_process():
    result = sanitised(str(HERE / "test_simt_probe.py"), "-k", "faults_are_errors and beyond")
    assert result.returncode != 0
    # What lies beyond may be a block that was freed.
    assert "ERROR: AddressSanitizer: heap-" in result.stdout
    assert "fault_kernel" in result.stdout
