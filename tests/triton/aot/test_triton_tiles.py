import pytest
import torch
from pyeff.triton_kernels import measured_tiles, tiles
from pyeff.triton_kernels.measured_tiles import Asked
from pyeff.triton_kernels.tiles import INTERPRETER, TILES, Limits, Tile

from pyeff import _measured
from pyeff._measured import Table, TileRow
from pyeff.tune import tuner

pytestmark = pytest.mark.aot
CUDA = torch.device("cuda", 0)
HALF = TILES["gemm", 90]["half"]


@pytest.fixture
def device(monkeypatch):
    def set_limits(shared=227 * 1024):
        monkeypatch.setattr(tiles, "device_limits", lambda device: Limits(90, 132, shared, 2**20))

    set_limits()
    return set_limits


@pytest.mark.parametrize(
    ("rows", "cols", "groups", "expected"),
    [
        (32 * 56 * 56, 256, 1, HALF[0]),
        (32 * 56 * 56, 64, 1, HALF[1]),  # the widest tile is twice as wide
        (8 * 14 * 14, 256, 1, HALF[3]),  # larger ones leave processors idle
        (49, 16, 1, HALF[3]),
        (1568, 128, 11, HALF[0]),  # the groups fill the device
    ],
)
def test_the_first_tile_that_fills_the_device(device, rows, cols, groups, expected):
    assert tiles.choose("gemm", "half", CUDA, rows, cols, groups) == expected


def test_a_device_with_little_shared_memory_gets_a_smaller_tile(device):
    device(shared=99 * 1024)
    large = tiles.choose("gemm", "half", CUDA, 10**6, 256, 1)
    device(shared=80 * 1024)
    assert large == HALF[0]
    assert tiles.choose("gemm", "half", CUDA, 10**6, 256, 1) == HALF[1]


def test_a_measured_tile_comes_first(device, monkeypatch):
    row = TileRow("gemm", "half", 4096, 64, 1, tuple(HALF[2]))
    table = Table("a device", [], [row])
    monkeypatch.setattr(_measured, "table", lambda device_type, index: table)
    assert tiles.choose("gemm", "half", CUDA, 10**6, 256, 1) == HALF[2]
    assert tiles.choose("gemm", "tf32", CUDA, 10**6, 256, 1) == TILES["gemm", 90]["tf32"][0]
    assert tiles.choose("gather", "half", CUDA, 10**6, 256, 1) == TILES["gather", 90]["half"][0]


def test_a_tuner_learns_what_is_asked_and_tries_tiles(device):
    def run():
        return [tiles.choose("gemm", "half", CUDA, 10**6, cols, 1) for cols in (256, 64, 256)]

    with measured_tiles.asking() as asked:
        first = run()
    assert asked == [Asked("gemm", "half", 10**6, cols, 1) for cols in (256, 64)]
    with measured_tiles.trying({asked[0]: HALF[3]}):
        assert run() == [HALF[3], first[1], HALF[3]]
        with measured_tiles.trying({asked[1]: HALF[2]}):
            assert run() == [HALF[3], HALF[2], HALF[3]]
    assert run() == first
    assert len(asked) == 2  # nothing is collected outside


def test_tiles_that_fit(device):
    assert tiles.fitting("gemm", "half", CUDA) == list(HALF)
    device(shared=80 * 1024)
    assert tiles.fitting("gemm", "half", CUDA) == list(HALF[1:])
    assert tiles.fitting("gemm", "half", torch.device("cpu")) == list(HALF[1:])


def test_the_tuner_keeps_the_fastest_tile_of_each_shape(device, monkeypatch):
    asked = Asked("gemm", "half", 10**6, 256, 1)

    def run():
        ran.append(tiles.choose(*asked[:2], CUDA, *asked[2:]))

    def timed(calls, device, slice_seconds):
        seconds = {}
        for name, call in calls.items():
            ran.clear()
            call()
            seconds[name] = 1.0 if ran == [HALF[2]] else 2.0
        return seconds

    ran = []
    monkeypatch.setattr(tuner, "seconds_of", timed)
    best = tuner._best_tiles(run, CUDA, 0.01)
    assert best == {asked: tuple(HALF[2])}
    ran.clear()
    tuner._with_tiles(run, best)()
    assert ran == [HALF[2]]


def test_cpu_tensors_are_for_the_interpreter():
    assert tiles.choose("grad_weight", "ieee", torch.device("cpu"), 8, 8, 1) == INTERPRETER


@pytest.mark.parametrize(("terms", "depth"), [(1, 16), (16, 16), (17, 32), (64, 64), (1000, 64)])
def test_depth_follows_the_channels(terms, depth):
    assert tiles.fit_depth(Tile(64, 64, 64, 4, 3), terms).depth == depth


@pytest.mark.parametrize(
    ("programs", "pixels", "shares"),
    [(1, 10**6, 264), (66, 10**6, 4), (1000, 10**6, 1), (1, 100, 1), (1, 64 * 4 * 3, 3)],
)
def test_pixel_shares(device, programs, pixels, shares):
    assert tiles.pixel_shares(CUDA, programs, pixels, 64) == shares


def test_arithmetic():
    assert tiles.arithmetic(torch.bfloat16, "tf32") == "half"
    assert tiles.arithmetic(torch.float32, "tf32") == "tf32"
    assert tiles.arithmetic(torch.float32, "ieee") == "ieee"


def test_half_of_the_stages_of_a_loaded_order_hold_data():
    tile = TILES["branch_grad_weight", 90]["half"][0]
    assert tile.stages == 5
    plain = tiles.shared_bytes(tile._replace(stages=3), "half")
    assert tiles.shared_bytes(tile, "half", "branch_grad_weight") == plain


def test_small_images_get_low_tiles(device):
    rows = [tiles.choose("branch", "half", CUDA, pixels, 64, 10**4).rows for pixels in (1, 16, 64)]
    assert rows == [16, 16, 64]


def test_weights_of_half_the_cache_leave_no_room_for_the_maps(device):
    assert not tiles.overflows_cache(CUDA, 2**19)  # the device of these tests has a cache of 2**20
    assert tiles.overflows_cache(CUDA, 2**19 + 1)
