"""The emulation itself: right kernels give the right result, wrong ones are noticed."""

import pytest
import torch

OPERATORS = ("probe",)
FAULTS = ["none", "no wait", "no barrier", "divergent", "early end", "beyond", "warp", "mask"]
THREADS = 64


def faulty(simt, fault, shared_bytes=4 * THREADS):
    x, y = torch.randn(THREADS), torch.empty(THREADS)
    simt.faulty(x, y, FAULTS.index(fault), shared_bytes)
    return x, y


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_product_through_copies_and_fragments(simt, dtype, reverse):
    a, b, y = torch.randn(16, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype), torch.empty(16, 8)
    simt.set_reverse(reverse)
    simt.product(a, b, y)
    # float32 is rounded to tf32, with ten bits
    tolerance = 1e-2 if dtype is torch.float32 else 1e-5
    torch.testing.assert_close(y, a.float() @ b.float().T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_right_kernel(simt, reverse):
    simt.set_reverse(reverse)
    x, y = faulty(simt, "none")
    torch.testing.assert_close(y, x.sum().expand(THREADS))


@pytest.mark.parametrize("fault", ["no wait", "no barrier"])
def test_what_was_not_waited_for_is_nan(simt, fault):
    assert faulty(simt, fault)[1].isnan().any()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent", r"faulty: barriers differ: __syncthreads \(.*probe.cu:\d+\) and"),
        ("early end", "a thread ends while others wait at __syncthreads"),
        ("beyond", "written beyond the shared memory of 256 bytes"),
        ("warp", "no thread can go on: from thread 0 on at __syncwarp"),
        ("mask", r"the mask of __syncwarp .* lacks the calling lane"),
    ],
)
def test_faults_are_errors(simt, fault, message):
    with pytest.raises(RuntimeError, match=message):
        faulty(simt, fault)
    x, y = faulty(simt, "none")  # the next launch is not touched by it
    torch.testing.assert_close(y, x.sum().expand(THREADS))


def test_a_missing_barrier_after_reading_shows_in_one_order(simt):
    x, y = torch.randn(THREADS), torch.empty(THREADS)
    right = []
    for reverse in (False, True):
        simt.set_reverse(reverse)
        simt.overwrite(x, y)
        right.append(torch.equal(y, x.roll(-1)))
    assert right == [False, False]


def test_shared_memory_above_the_limit(simt):
    with pytest.raises(RuntimeError, match=r"faulty: launch failed \(shared memory 200000 bytes\)"):
        faulty(simt, "none", 200000)
    x, y = faulty(simt, "none", 100000)
    torch.testing.assert_close(y, x.sum().expand(THREADS))


def test_an_impossible_grid_is_refused_in_words(simt):
    empty = torch.empty(0)
    message = (
        r"faulty: launch failed \(grid \[1, 1, 1\], block \[0, 1, 1\], shared memory 0 bytes\): "
        "invalid configuration argument"
    )
    with pytest.raises(RuntimeError, match=message):
        simt.faulty(empty, empty, 0, 0)


def test_launches_are_recorded(simt):
    faulty(simt, "none")
    assert simt.launches() == [
        {
            "name": "faulty",
            "grid": (1, 1, 1),
            "block": (THREADS, 1, 1),
            "shared_bytes": 4 * THREADS,
            "stream": 0x517,
            "device": 0,
        }
    ]
