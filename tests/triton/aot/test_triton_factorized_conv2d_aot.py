import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ahead_of_time import SHARED_LIMIT, compile_launch, recorded_launches
from pyeff.triton_kernels import factorized_conv2d as launchers
from pyeff.triton_kernels.tiles import TILES

pytestmark = pytest.mark.aot

NEWEST = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
N, HEIGHT, WIDTH = 2, 64, 128
DTYPES = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def on_meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def maps(*shape, dtype):
    n, channels, height, width = shape
    return on_meta(n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own: kernels that two cases share are compiled once, and nothing stale is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The binaries of what a call launches."""

    def run(architecture, call, *arguments, **options):
        with recorded_launches(monkeypatch, architecture) as launches:
            call(*arguments, **options)
        return [compile_launch(one, architecture, tmp_path) for one in launches]

    return run


@pytest.fixture
def forward(compiled):
    """Compiles a forward of an ERFNet pair of so many channels, with everything around it."""

    def run(architecture, channels, kind, tile, *, fused, vertical=True):
        dtype = DTYPES[kind]
        x = maps(N, channels, HEIGHT, WIDTH, dtype=dtype)
        shapes = (3, 1), (1, 3)
        first, second = shapes if vertical else reversed(shapes)
        w_first, w_second = (maps(channels, channels, *s, dtype=dtype) for s in (first, second))
        vector = on_meta(channels, dtype=dtype)
        epilogue = launchers.Epilogue(vector, vector, vector, x, "relu")
        precision = "ieee" if kind == "half" else kind
        arguments = (x, w_first, vector, w_second, epilogue, (1, 2, 2), "relu", precision)
        return compiled(architecture, launchers.forward, *arguments, fused=fused, tile=tile)

    return run


def check_fits(binary, architecture):
    assert f"sm_{architecture}" in binary.ptx
    assert binary.resources["REG"] <= 255, binary.name
    assert binary.spills == 0, f"{binary.name} spills: {binary.resources}"
    assert binary.resources["STACK"] == 0, binary.name
    assert binary.shared <= SHARED_LIMIT[architecture], binary.name


def check_matrix_instructions(binary, architecture, kind, rows):
    instructions = binary.tensor_core_instructions
    if kind == "ieee":
        assert not instructions
    else:
        # The newer instructions take 64 rows at least.
        assert set(instructions) == {NEWEST[architecture] if rows >= 64 else "mma.sync"}


def pair_tiles():
    for architecture in (80, 90, 100):
        for kind in ("half", "tf32"):
            for tile in TILES["pair", architecture][kind]:
                yield pytest.param(architecture, kind, tile, id=f"{architecture}-{kind}-{tile}")
    tile = TILES["pair", 90]["ieee"][0]
    yield pytest.param(90, "ieee", tile, id="90-ieee")


@pytest.mark.parametrize(("architecture", "kind", "tile"), pair_tiles())
def test_fused_pair(architecture, kind, tile, forward):
    (binary,) = forward(architecture, tile.cols, kind, tile, fused=True)
    assert "pair" in binary.name
    check_fits(binary, architecture)
    check_matrix_instructions(binary, architecture, kind, tile.rows)
    assert binary.count(r"cp\.async\.c[ag]") > 0, "the loads are not pipelined"


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("kind", "vertical"), [("half", True), ("tf32", False)])
def test_two_kernels(architecture, kind, vertical, forward):
    tile = TILES["gemm", architecture][kind][1]
    first, second = forward(architecture, 128, kind, tile, fused=False, vertical=vertical)
    for binary in (first, second):
        assert "line_forward" in binary.name
        check_fits(binary, architecture)
        check_matrix_instructions(binary, architecture, kind, tile.rows)
        assert binary.count(r"cp\.async\.c[ag]") > 0, "the loads are not pipelined"


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "inner"), [(torch.float16, "relu"), (torch.bfloat16, "silu")])
def test_backward(architecture, dtype, inner, compiled):
    x, grad = (maps(N, 128, HEIGHT, WIDTH, dtype=dtype) for _ in range(2))
    w_first, w_second = (maps(128, 128, *taps, dtype=dtype) for taps in ((3, 1), (1, 3)))
    vector = on_meta(128, dtype=dtype)
    arguments = (grad, x, w_first, vector, w_second, (1, 2, 2), inner, (True,) * 5)
    binaries = compiled(architecture, launchers.backward, *arguments)
    names = [binary.name for binary in binaries]
    assert sum("line_forward" in name for name in names) == 1  # the middle map, again
    assert sum("line_grad_input" in name for name in names) == 2
    assert sum("grad_weight" in name for name in names) == 2
    for binary in binaries:
        check_fits(binary, architecture)
        if "line" in binary.name:
            assert set(binary.tensor_core_instructions) == {NEWEST[architecture]}
