"""The shape of the repository: whole slices, imports that point downwards, files of one subject."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Operator -> the pieces that it does not have, and why.
OPERATORS: dict[str, dict[str, str]] = {
    "nested_conv2d": {},
    "branch_conv2d": {},
    "factorized_conv2d": {},
    "branch_stage": {
        "triton_kernels/{op}.py": "its maps live in shared memory, which Triton does not hand out",
        "benchmarks/ops/bench_{op}.py": "measured beside branch_conv2d",
    },
    "branch_linear": {
        "csrc/pyeff/{op}.h": "branch_conv2d on maps of one pixel",
        "csrc/cpu/{op}.cpp": "branch_conv2d on maps of one pixel",
        "csrc/cuda/{op}.cu": "branch_conv2d on maps of one pixel",
        "tests/simt/test_simt_{op}.py": "branch_conv2d on maps of one pixel",
        "csrc/bindings/{op}.cpp": "branch_conv2d on maps of one pixel",
        "triton_kernels/{op}.py": "branch_conv2d on maps of one pixel",
        "benchmarks/ops/bench_{op}.py": "branch_conv2d on maps of one pixel",
    },
    "combine": {"benchmarks/ops/bench_{op}.py": "timed within a whole HydraNet"},
    "top_k_routes": {"benchmarks/ops/bench_{op}.py": "timed within a whole HydraNet"},
}
SLICE = [
    "csrc/pyeff/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "csrc/bindings/{op}.cpp",
    "pyeff/reference/{op}.py",
    "pyeff/ops/{op}.py",
    "triton_kernels/{op}.py",
    "tests/ops/test_{op}.py",
    "tests/simt/test_simt_{op}.py",
    "benchmarks/ops/bench_{op}.py",
]

# Bottom to top. A module may import from its own layer (without a cycle) and from those below.
# "pyeff" is the package's own front: what `import pyeff` offers.
LAYERS = [
    {"reference", "_C", "triton_kernels", "_extras", "_archive", "_measured"},
    {"ops"},
    {"tune"},
    {"nn"},
    {"measure"},
    {"models"},
    {"compress"},
    {"convert"},
    {"deploy"},
    {"checkpoint"},
    {"train"},
    {"pyeff", "_info"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Path -> why it is one subject all the same.
LONG_FILES: dict[str, str] = {}
LONGEST = 400


def missing_pieces(op: str, root: Path) -> list[str]:
    pieces = [piece.format(op=op) for piece in SLICE if piece not in OPERATORS.get(op, {})]
    return [path for path in pieces if not (root / path).is_file()]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "triton_kernels":
        parts.insert(0, "pyeff")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    """Every Python module of the package by its installed name."""
    paths = [*(ROOT / "pyeff").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
    return {module_name(path): path for path in paths}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "pyeff"


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what only the type checker sees."""

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def imports(
    source: str, module: str, is_package: bool, known: set[str], types: bool = True
) -> set[str]:
    """Modules of pyeff that this source names, in any function or under any condition.

    ``types`` tells whether imports for the type checker alone count.
    """
    tree = ast.parse(source)
    if not types:
        tree = WithoutTypeChecking().visit(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                parent = module.split(".")[: len(module.split(".")) - up]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                extension = inner == "pyeff._C"
                found.add(inner if inner in known or extension else base)
    return {name for name in found if name.split(".")[0] == "pyeff"}


def upward(module: str, imported: set[str]) -> list[str]:
    return sorted(name for name in imported if RANK[layer(name)] > RANK[layer(module)])


@functools.cache
def import_graph(types: bool = True) -> dict[str, set[str]]:
    known = set(modules())
    return {
        name: imports(path.read_text(), name, path.name == "__init__.py", known, types)
        for name, path in modules().items()
    }


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_its_whole_slice(op):
    assert missing_pieces(op, ROOT) == []


def test_every_public_operator_is_listed():
    written = {path.stem for path in (ROOT / "pyeff/ops").glob("[!_]*.py")}
    assert written == set(OPERATORS)


def test_a_missing_piece_is_noticed(tmp_path):
    assert missing_pieces("nested_conv2d", tmp_path) == [
        p.format(op="nested_conv2d") for p in SLICE
    ]


def test_every_module_has_a_place_in_the_order():
    unplaced = sorted({layer(name) for name in modules()} - set(RANK))
    assert unplaced == [], "give it a place in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module):
    assert upward(module, import_graph()[module]) == []


def test_no_import_cycles():
    try:
        TopologicalSorter(import_graph(types=False)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    from pyeff.train import loop", {"pyeff.train"}),
        ("import pyeff.cli.main as main", {"pyeff.cli.main"}),
        ("from ..models import dvn", {"pyeff.models.dvn"}),
        ("from . import units", {"pyeff.nn.units"}),
        ("from pyeff import _C", {"pyeff._C"}),
        ("import torch", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    known = {"pyeff.models.dvn", "pyeff.nn.units", "pyeff.cli.main"}
    assert imports(source, "pyeff.nn.layer", False, known) == found


def test_imports_for_types_alone_can_be_left_out():
    source = "if TYPE_CHECKING:\n    from pyeff.nn.units import Range"
    assert imports(source, "pyeff.nn.layer", False, {"pyeff.nn.units"}) == {"pyeff.nn.units"}
    assert imports(source, "pyeff.nn.layer", False, {"pyeff.nn.units"}, types=False) == set()


def test_an_upward_import_is_noticed():
    assert upward("pyeff.nn.layer", {"pyeff.train", "pyeff.ops"}) == ["pyeff.train"]


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_environment_variables_are_read(module):
    tree = ast.parse(modules()[module].read_text())
    named = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert not named & {"environ", "environb", "getenv", "putenv"}


def test_no_environment_variables_are_read_by_native_code():
    readers = [p.name for p in (ROOT / "csrc").rglob("*.*") if "getenv" in p.read_text()]
    assert readers == []


def test_long_files_have_a_reason():
    sources = [*(ROOT / "csrc").rglob("*.*"), *modules().values()]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    long = {path for path, lines in lengths.items() if lines > LONGEST}
    assert long == set(LONG_FILES)
