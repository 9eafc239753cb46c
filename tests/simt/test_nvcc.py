"""The kernels through the real compiler: nothing is spilled, and no kernel grows unnoticed.

For sm_80, which every kernel is written for. ``nvcc_kernels.py`` compiles for all architectures of
the build and records what it finds: five minutes of a processor.
"""

import functools
import json
import shutil

import pytest
from nvcc_kernels import (
    BUDGET,
    SLACK_REGISTERS,
    Kernel,
    architectures,
    code_flags,
    compile_all,
    kernel_name,
    most,
    parse,
    sources,
    summary,
)

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void a::pair_kernel<a::Tile<int> >(int)' for 'sm_80'
ptxas info    : Function properties for void a::pair_kernel<a::Tile<int> >(int)
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN5pyeff4cuda8_N_aca3915line_add_kernelEv' for 'sm_90'
ptxas info    : Function properties for _ZN5pyeff4cuda8_N_aca3915line_add_kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 512 bytes smem, 424 bytes cmem[0]
"""


@functools.cache
def built():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    return compile_all(["80-real"], nvcc)


def budget():
    return json.loads(BUDGET.read_text())


def test_the_compiler_s_report_is_read():
    assert parse(REPORT) == [
        Kernel("pair_kernel", "sm_80", 64, 20, 0),
        Kernel("line_add_kernel", "sm_90", 32, 0, 512),
    ]
    assert most([Kernel("a", "sm_80", 40, 0, 0), Kernel("a", "sm_90", 32, 0, 16)]) == {
        "a": {"registers": 40, "shared": 16}
    }
    assert summary(parse(REPORT))["spilled"] == 20


def test_the_hash_of_an_anonymous_namespace_is_not_part_of_a_name():
    name = "top_k_routes_kernel"
    middle = "f3b9_15_top_k_routes_cu_ff790fd5"
    entry = f"_ZN5pyeff4cuda40_N_{len(middle) + 2 + len(name)}{middle}{len(name)}{name}Ev"
    assert kernel_name(entry) == name


def test_the_architectures_are_those_of_the_build():
    names = architectures()
    assert "80-real" in names
    assert code_flags(["90-real", "80-virtual"]) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_every_source_has_its_budget():
    assert sorted(budget()) == [source.name for source in sources()]


def test_no_kernel_spills():
    for name, (kernels, _) in built().items():
        assert not [kernel for kernel in kernels if kernel.spilled], name


def test_every_kernel_is_within_its_budget():
    for name, (kernels, _) in built().items():
        found, allowed = most(kernels), budget()[name]["kernels"]
        assert sorted(found) == sorted(allowed), name
        for kernel, numbers in found.items():
            most_registers = allowed[kernel]["registers"] + SLACK_REGISTERS
            assert numbers["registers"] <= most_registers, kernel
            assert numbers["shared"] <= allowed[kernel]["shared"], kernel
