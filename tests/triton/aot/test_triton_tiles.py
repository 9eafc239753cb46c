import pytest
import torch
from pyeff.triton_kernels import tiles
from pyeff.triton_kernels.tiles import INTERPRETER, TILES, Limits, Tile

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
