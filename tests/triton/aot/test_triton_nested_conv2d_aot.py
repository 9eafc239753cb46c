import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ahead_of_time import LOAD_OF_16_BYTES, SHARED_LIMIT, compile_launch, recorded_launches
from pyeff.triton_kernels import nested_conv2d as launchers
from pyeff.triton_kernels import nested_conv2d_depthwise
from pyeff.triton_kernels.tiles import DEPTHWISE, TILES, shared_bytes

pytestmark = pytest.mark.aot

TASKS = ["forward", "grad_input", "grad_weight"]
LEVEL = ((32, 192), (16, 144))  # of a layer of 256 -> 256 channels
WIDE_TILES = {1: TILES["gather", 90]["half"][0], 256: DEPTHWISE}
WINDOW = ((1, 1), (1, 1, 1, 1), (1, 1))


def rows_of(task, architecture, kind):
    return TILES["grad_weight" if task == "grad_weight" else "gemm", architecture][kind]


def compilations():
    """All of the table for sm_90's halves; else the rows that need the most registers."""
    for architecture in (80, 90, 100):
        for task in TASKS:
            half, tf32, ieee = (rows_of(task, architecture, k) for k in ("half", "tf32", "ieee"))
            for tile in half if architecture == 90 else half[:2]:
                yield architecture, task, "half", torch.float16, tile
            yield architecture, task, "half", torch.bfloat16, half[0]
            for tile in tf32[::2] if architecture == 90 else tf32[:1]:
                yield architecture, task, "tf32", torch.float32, tile
            if architecture == 90:
                yield architecture, task, "ieee", torch.float32, ieee[0]


def name(value):
    if isinstance(value, tuple):
        return "x".join(str(size) for size in value[:3])
    return str(value).removeprefix("torch.")


def on_meta(*shape, dtype):
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return empty.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else empty


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own: kernels that two cases share are compiled once, and nothing stale is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Compiles what a direction launches on a layer of 256 channels, 3x3, on 14x14 pixels."""

    def run(task, architecture, dtype, precision, tile, selections=LEVEL, groups=1):
        sizes = [
            side.numel() if torch.is_tensor(side) else side[1] - side[0] for side in selections
        ]
        x = on_meta(8, sizes[0], 14, 14, dtype=dtype)
        y = on_meta(8, sizes[1], 14, 14, dtype=dtype)
        weight = on_meta(256, 256 // groups, 3, 3, dtype=dtype)
        options = {"precision": precision, "tile": tile}
        layer = (*selections, *WINDOW, groups)
        with recorded_launches(monkeypatch, architecture) as launches:
            if task == "forward":
                bias = on_meta(256, dtype=dtype)
                launchers.forward(x, weight, bias, *layer, "relu", **options)
            elif task == "grad_input":
                launchers.grad_input(y, weight, x.shape, *layer, **options)
            else:
                launchers.grad_weight(y, x, weight.shape, *layer, shares=4, **options)
        return [compile_launch(one, architecture, tmp_path) for one in launches]

    return run


def check_fits(binary, architecture):
    assert binary.resources["REG"] <= 255, binary.name
    assert binary.spills == 0, f"{binary.name} spills: {binary.resources}"
    assert binary.resources["STACK"] == 0, binary.name
    assert binary.shared <= SHARED_LIMIT[architecture], binary.name


@pytest.mark.parametrize(
    ("architecture", "task", "kind", "dtype", "tile"), list(compilations()), ids=name
)
def test_gemm(architecture, task, kind, dtype, tile, launch):
    precision = "ieee" if kind == "half" else kind
    gemm, *reduction = launch(task, architecture, dtype, precision, tile)
    assert f"sm_{architecture}" in gemm.ptx
    for binary in (gemm, *reduction):
        check_fits(binary, architecture)
    assert len(reduction) == (task == "grad_weight")
    instructions = gemm.tensor_core_instructions
    if kind == "ieee":
        assert not instructions
    else:
        newest = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[architecture]
        # The newer instructions take 64 rows at least.
        assert set(instructions) == {newest if tile.rows >= 64 else "mma.sync"}
    assert gemm.count(r"cp\.async\.c[ag]") > 0, "the loads are not pipelined"
    assert gemm.shared <= shared_bytes(tile, kind) + 64, "the table's estimate is too low"


@pytest.mark.parametrize("task", ["forward", "grad_input"])
def test_channels_innermost_are_loaded_16_bytes_at_once(task, launch):
    (binary,) = launch(task, 90, torch.float16, "ieee", rows_of(task, 90, "half")[0])
    sizes = {16} if task == "grad_input" else {4, 8, 16}
    copies = {size for size in (4, 8, 16) if binary.count(rf"cp\.async\.c[ag][^;]*\], {hex(size)}")}
    assert 16 in copies
    assert copies <= sizes


@pytest.mark.parametrize("task", TASKS)
def test_index(task, launch):
    index = tuple(torch.empty(size, dtype=torch.int64, device="meta") for size in (160, 128))
    tile = TILES["grad_weight" if task == "grad_weight" else "gather", 90]["half"][0]
    gemm, *reduction = launch(task, 90, torch.float16, "ieee", tile, selections=index)
    for binary in (gemm, *reduction):
        check_fits(binary, 90)
    assert "wgmma" in gemm.tensor_core_instructions


@pytest.mark.parametrize("groups", [1, 256])
@pytest.mark.parametrize("task", TASKS)
def test_pixel_numbers_of_64_bits(task, groups, launch, monkeypatch):
    monkeypatch.setattr(launchers, "INT32_MAX", 0)
    monkeypatch.setattr(nested_conv2d_depthwise, "INT32_MAX", 0)
    same = ((32, 192), (32, 192))
    for binary in launch(task, 90, torch.float16, "ieee", WIDE_TILES[groups], same, groups):
        check_fits(binary, 90)


# 72 channels: neither their number nor a stride is a multiple of 16, so each is loaded by itself.
@pytest.mark.parametrize("channels", [160, 72])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("task", TASKS)
def test_depthwise(task, architecture, channels, launch):
    same = ((32, 32 + channels), (32, 32 + channels))
    binaries = launch(task, architecture, torch.float16, "ieee", DEPTHWISE, same, groups=256)
    assert "depthwise" in binaries[0].name
    for binary in binaries:
        check_fits(binary, architecture)
    assert bool(binaries[0].count(LOAD_OF_16_BYTES)) == (channels == 160)
