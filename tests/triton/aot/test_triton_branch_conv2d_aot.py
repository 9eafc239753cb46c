import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ahead_of_time import LOAD_OF_16_BYTES, SHARED_LIMIT, compile_launch, recorded_launches
from pyeff.triton_kernels import branch_conv2d as launchers
from pyeff.triton_kernels import combine, top_k_routes
from pyeff.triton_kernels.tiles import DEPTHWISE, TILES, shared_bytes

pytestmark = pytest.mark.aot

TASKS = ["forward", "grad_input", "grad_weight"]
WINDOW = ((1, 1), (1, 1, 1, 1), (1, 1))
IMAGES, ROUTES, BRANCHES, CHANNELS, SIDE = 32, 4, 20, 128, 14
# What a thread uses of sm_90's registers, a little above what ptxas made of it: a change that
# needs much more would leave fewer programs on a processor.
REGISTERS = {
    ("forward", 128): 140,
    ("grad_input", 128): 144,
    ("grad_weight", 128): 172,
    ("forward", 16): 80,
    ("grad_input", 16): 88,
    ("grad_weight", 32): 96,
}


def rows_of(task, architecture, kind):
    name = "branch_grad_weight" if task == "grad_weight" else "branch"
    return TILES[name, architecture][kind]


def compilations():
    """For every architecture the largest tile of each kind and the smallest of the halves."""
    for architecture in (80, 90, 100):
        for task in TASKS:
            half, tf32, ieee = (rows_of(task, architecture, k) for k in ("half", "tf32", "ieee"))
            yield architecture, task, "half", torch.float16, half[0]
            yield architecture, task, "half", torch.bfloat16, half[0 if architecture == 100 else 1]
            yield architecture, task, "half", torch.float16, half[-1]
            yield architecture, task, "tf32", torch.float32, tf32[0]
            if architecture == 90:
                yield architecture, task, "tf32", torch.float32, tf32[-1]
                yield architecture, task, "ieee", torch.float32, ieee[0]


def name(value):
    if isinstance(value, tuple):
        return "x".join(str(size) for size in value[:3])
    return str(value).removeprefix("torch.")


def on_meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def maps(*shape, dtype):
    *outer, channels, height, width = shape
    return on_meta(*outer, height, width, channels, dtype=dtype).movedim(-1, -3)


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
def launch(compiled):
    """Compiles what a direction launches on 20 branches of 3x3, on 14x14 pixels."""

    def run(
        task,
        architecture,
        dtype,
        precision,
        tile,
        groups=1,
        shared=True,
        shares=4,
        channels=CHANNELS,
    ):
        outer = (IMAGES,) if shared else (IMAGES, ROUTES)
        x = maps(*outer, channels, SIDE, SIDE, dtype=dtype)
        y = maps(IMAGES, ROUTES, channels, SIDE, SIDE, dtype=dtype)
        weight = maps(BRANCHES, channels, channels // groups, 3, 3, dtype=dtype)
        index = on_meta(IMAGES, ROUTES, dtype=torch.int32)
        layer = (index, *WINDOW, groups)
        options = {"precision": precision, "tile": tile}
        if task == "forward":
            bias = on_meta(BRANCHES, channels, dtype=dtype)
            return compiled(
                architecture, launchers.forward, x, weight, bias, *layer, "relu", **options
            )
        if task == "grad_input":
            return compiled(
                architecture, launchers.grad_input, y, weight, x.shape, *layer, **options
            )
        options["shares"] = shares
        return compiled(architecture, launchers.grad_weight, y, x, weight.shape, *layer, **options)

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
    binaries = launch(task, architecture, dtype, precision, tile)
    gemm = next(b for b in binaries if b.name.startswith("branch_conv2d"))
    assert f"sm_{architecture}" in gemm.ptx
    for binary in binaries:
        check_fits(binary, architecture)
    # The plan, the sums, and their sum; only weights that overflow the cache need a plan before.
    assert len(binaries) == {"forward": 1, "grad_input": 1, "grad_weight": 3}[task]
    instructions = gemm.tensor_core_instructions
    if kind == "ieee":
        assert not instructions
    else:
        newest = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[architecture]
        # The newer instructions take 64 rows at least.
        assert set(instructions) == {newest if tile.rows >= 64 else "mma.sync"}
    assert gemm.count(r"cp\.async\.c[ag]") > 0, "the loads are not pipelined"
    stages = shared_bytes(tile, kind, "branch_grad_weight" if task == "grad_weight" else "branch")
    assert gemm.shared <= stages + 1024, "the table's estimate is too low"
    # On the older architecture the matrix instructions read the last stage from registers.
    assert gemm.shared >= stages // 2, "a stage of the pipeline is missing"
    if architecture == 90 and dtype == torch.float16:
        assert gemm.resources["REG"] <= REGISTERS[task, tile.rows]


@pytest.mark.parametrize("task", TASKS)
def test_channels_innermost_are_loaded_16_bytes_at_once(task, launch):
    binaries = launch(task, 90, torch.float16, "ieee", rows_of(task, 90, "half")[0])
    gemm = next(b for b in binaries if b.name.startswith("branch_conv2d"))
    assert gemm.count(r"cp\.async\.c[ag][^;]*\], 0x10") >= 8


@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_pixel_numbers_of_64_bits(groups, launch, monkeypatch):
    monkeypatch.setattr(launchers, "INT32_MAX", 0)
    tile = DEPTHWISE if groups > 1 else rows_of("grad_weight", 90, "half")[0]
    for binary in launch("grad_weight", 90, torch.float16, "ieee", tile, groups):
        check_fits(binary, 90)


@pytest.mark.parametrize("task", TASKS)
def test_one_x_for_each_pair(task, launch):
    tile = rows_of(task, 90, "half")[0]
    for binary in launch(task, 90, torch.bfloat16, "ieee", tile, shared=False, shares=1):
        check_fits(binary, 90)


# 72 channels: neither their number nor a stride is a multiple of 16, so each is loaded by itself.
@pytest.mark.parametrize("channels", [CHANNELS, 72])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("task", TASKS)
def test_depthwise(task, architecture, channels, launch):
    binaries = launch(
        task, architecture, torch.float16, "ieee", DEPTHWISE, groups=channels, channels=channels
    )
    for binary in binaries:
        check_fits(binary, architecture)
    direct = next(b for b in binaries if "depthwise" in b.name)
    assert bool(direct.count(LOAD_OF_16_BYTES)) == (channels == CHANNELS)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_bias_gradient(architecture, compiled):
    grad_y = maps(IMAGES, ROUTES, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16)
    index = on_meta(IMAGES, ROUTES, dtype=torch.int32)
    binaries = compiled(architecture, launchers.grad_bias, grad_y, index, BRANCHES)
    assert [b.name for b in binaries] == ["branch_plan_kernel", "branch_sum_kernel"]
    for binary in binaries:
        check_fits(binary, architecture)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(80, torch.float32), (90, torch.float64), (90, torch.bfloat16), (100, torch.float16)],
    ids=name,
)
def test_routes(architecture, dtype, compiled):
    scores = on_meta(IMAGES, BRANCHES, dtype=dtype)
    index = on_meta(IMAGES, ROUTES, dtype=torch.int32)
    weight = on_meta(IMAGES, ROUTES, dtype=dtype)
    binaries = compiled(architecture, top_k_routes.forward, scores, ROUTES, "softmax")
    binaries += compiled(architecture, top_k_routes.forward, scores, ROUTES, "binary")
    binaries += compiled(architecture, top_k_routes.grad_scores, weight, index, weight, BRANCHES)
    assert len(binaries) == 3
    for binary in binaries:
        check_fits(binary, architecture)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(80, torch.float16), (90, torch.bfloat16), (90, torch.float32), (100, torch.float16)],
    ids=name,
)
def test_combine(architecture, dtype, compiled):
    y = on_meta(IMAGES, ROUTES, 256, dtype=dtype)
    projection = on_meta(BRANCHES, 100, 256, dtype=dtype)
    bias = on_meta(100, dtype=dtype)
    out = on_meta(IMAGES, 100, dtype=dtype)
    index = on_meta(IMAGES, ROUTES, dtype=torch.int32)
    weight = on_meta(IMAGES, ROUTES, dtype=torch.float32)
    routes = (index, weight)
    binaries = compiled(architecture, combine.forward, y, projection, bias, *routes)
    binaries += compiled(architecture, combine.grad_input, out, y, projection, *routes)
    binaries += compiled(architecture, combine.grad_projection, out, y, projection.shape, *routes)
    for binary in binaries:
        check_fits(binary, architecture)
    gemm = next(b for b in binaries if "grad_projection" in b.name)
    assert bool(gemm.tensor_core_instructions) == (dtype != torch.float32)
