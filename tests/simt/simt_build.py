"""Builds ``_simt``: the CUDA kernels and their bindings, compiled for the host.

Objects are kept in ``build/simt`` under the hash of what they were compiled from.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"
COMPILER = "g++"

# Operator -> the sources of its kernels and its binding.
OPERATORS: dict[str, tuple[str, ...]] = {
    "probe": ("tests/simt/probe.cu",),
    "factorized_conv2d": (
        "csrc/cuda/factorized_conv2d.cu",
        "csrc/cuda/factorized_conv2d_grad_weight.cu",
        "csrc/cuda/factorized_conv2d_line.cu",
        "csrc/bindings/factorized_conv2d.cpp",
        "csrc/bindings/factorized_conv2d_cuda.cpp",
    ),
    "branch_conv2d": (
        "csrc/cuda/branch_conv2d.cu",
        "csrc/cuda/branch_conv2d_grad_weight.cu",
        "csrc/bindings/branch_conv2d.cpp",
    ),
    "branch_stage": (
        "csrc/cuda/branch_stage.cu",
        "csrc/cuda/branch_stage_layout.cu",
        "csrc/bindings/branch_stage.cpp",
        "csrc/pyeff/branch_stage.cpp",
    ),
    "combine": ("csrc/cuda/combine.cu", "csrc/bindings/combine.cpp"),
    "top_k_routes": ("csrc/cuda/top_k_routes.cu", "csrc/bindings/top_k_routes.cpp"),
    "nested_conv2d": (
        "csrc/bindings/nested_conv2d.cpp",
        "csrc/cuda/nested_conv2d.cu",
        "csrc/cuda/nested_conv2d_depthwise.cu",
        "csrc/cuda/nested_conv2d_grad_weight.cu",
    ),
}
COMMON = ("tests/simt/module.cpp", "csrc/pyeff/tensor_view.cpp")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def _flags(sanitized: bool) -> list[str]:
    includes = [HERE / "include", ROOT / "csrc", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    return [
        "-std=c++17",
        "-g1",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
        "-Wno-unused-function",
        # What pyeff._C has registered is another module's.
        "-fno-gnu-unique",
        "-DPYBIND11_INTERNALS_VERSION=4711",
        "-DPYEFF_SIMT",
        "-DPYEFF_WITH_CUDA=1",
        '-DPYEFF_CUDA_ARCHITECTURES="host"',
        '-DPYEFF_VERSION="0"',
        f'-DPYEFF_COMPILER="{COMPILER}"',
        *(f"-I{path}" for path in includes),
        *(SANITIZE if sanitized else ()),
    ]


def _digest(texts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:20]


def _hash_of(command: list[str], paths: Iterable[str]) -> str:
    contents = [Path(p).read_bytes() if Path(p).is_file() else b"" for p in sorted(paths)]
    return _digest([json.dumps(command).encode(), *contents])


def _dependencies(text: str) -> list[str]:
    """Those files of this repository that a make rule of the compiler names."""
    names = text.split(":", 1)[1].replace("\\\n", " ").split()
    return [name for name in names if Path(name).resolve().is_relative_to(ROOT)]


def _compiled(source: str, sanitized: bool) -> Path:
    """The object of one source, compiled if it or anything that it includes has changed."""
    # Of the bindings, and of the few small cases for the sanitizers, the compiler takes longer than
    # what it would make faster.
    optimised = "-O1" if source.endswith(".cu") and not sanitized else "-O0"
    flags = _flags(sanitized)
    command = [COMPILER, optimised, *flags, "-x", "c++", "-c", str(ROOT / source)]
    stem = f"{Path(source).name}-{_digest([json.dumps(command).encode()])}"
    names = CACHE / f"{stem}.json"
    if names.is_file():
        known = CACHE / f"{stem}-{_hash_of(command, json.loads(names.read_text()))}.o"
        if known.is_file():
            return known
    # Not of the names that are cleared away below: another process may be compiling the same.
    fresh = CACHE / f"{os.getpid()}-{stem}.o"
    rule = fresh.with_suffix(".d")
    result = subprocess.run(
        [*command, "-o", str(fresh), "-MMD", "-MF", str(rule)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{source} does not compile for the host:\n{result.stderr}")
    sys.stderr.write(result.stderr)
    paths = _dependencies(rule.read_text())
    rule.unlink()
    target = CACHE / f"{stem}-{_hash_of(command, paths)}.o"
    for old in CACHE.glob(f"{stem}-*.o"):
        if old not in (fresh, target):
            old.unlink(missing_ok=True)
    os.replace(fresh, target)
    listing = names.with_suffix(f".{os.getpid()}")
    listing.write_text(json.dumps(paths))
    os.replace(listing, names)
    return target


def build(*operators: str, sanitized: bool = False) -> Path:
    """The shared library with the bindings of these operators, built where it is not there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = dict.fromkeys([*COMMON, *(s for name in operators for s in OPERATORS[name])])
    # Kernels and their launchers are under test; the bindings are those of the plain build.
    jobs = [(source, sanitized and source.endswith(".cu")) for source in sources]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compiled(*job), jobs))
    library = CACHE / f"_simt-{_digest(o.name.encode() for o in objects)}.so"
    if not library.is_file():
        fresh = library.with_suffix(f".{os.getpid()}")
        link = [COMPILER, "-shared", "-Wl,-z,lazy", *(SANITIZE if sanitized else ())]
        subprocess.run([*link, *map(str, objects), "-o", str(fresh)], check=True)
        os.replace(fresh, library)
    return library


@cache
def load(*operators: str, sanitized: bool = False) -> ModuleType:
    """The module with the bindings of these operators.

    The CPU kernels that the bindings also name are not linked: nothing calls them, and a function
    is looked up at its first call.
    """
    library = build(*operators, sanitized=sanitized)
    # pybind11 hands out a module of the same full name again; the function to call is PyInit__simt.
    name = f"{library.stem.replace('-', '_')}._simt"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module
