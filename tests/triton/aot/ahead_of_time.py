"""Compiles what a launcher would launch, for a GPU that is not here.

The launcher runs on meta tensors: real sizes and strides, no memory. Its launches are recorded
instead of run, then compiled exactly as Triton would at that call: the same specialisation on
ones, multiples of 16 and aligned pointers. No driver is asked for.
"""

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from pyeff.triton_kernels import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOAD_OF_16_BYTES = r"\bld\.global\S*\.v4\.b32"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what ptxas made of it."""

    name: str
    ptx: str
    cubin: bytes
    shared: int
    folder: Path

    def _tool(self, *command):
        path = self.folder / "kernel.cubin"
        path.write_bytes(self.cubin)
        tool = [str(_TOOLS / command[0]), *command[1:], str(path)]
        return subprocess.run(tool, capture_output=True, text=True, check=True).stdout

    @cached_property
    def resources(self):
        """Registers, stack and local memory of a thread."""
        found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", self._tool("cuobjdump", "-res-usage"))
        return {name: int(value) for name, value in found}

    @cached_property
    def spills(self):
        """Loads from and stores to local memory: what the registers could not hold."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self._tool("nvdisasm", "-c")))

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))

    @property
    def tensor_core_instructions(self):
        """How many matrix instructions, by their generation."""
        patterns = {
            "mma.sync": r"\bmma\.sync",
            "wgmma": r"\bwgmma\.mma_async",
            "tcgen05": r"\btcgen05\.mma",
        }
        counts = {name: self.count(pattern) for name, pattern in patterns.items()}
        return {name: count for name, count in counts.items() if count}


@contextmanager
def recorded_launches(monkeypatch, architecture):
    """The launches inside the block, as for a device of this architecture with 132 processors."""
    launches = []

    def record(self, *args, grid, warmup, **options):
        launches.append(Launch(self, grid, args, options))

    limits = tiles.Limits(architecture, 132, SHARED_LIMIT[architecture], 50 * 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        patch.setattr(tiles, "device_limits", lambda device: limits)
        yield launches


def compile_launch(launch, architecture, folder):
    """The binary of one launch for one architecture."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, arguments, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return Binary(
        compiled.metadata.name,
        compiled.asm["ptx"],
        compiled.asm["cubin"],
        compiled.metadata.shared,
        folder,
    )
