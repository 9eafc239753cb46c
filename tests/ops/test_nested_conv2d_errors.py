"""What nested_conv2d refuses, and with which words."""

import pytest
import torch

import pyeff
from pyeff.ops import nested_conv2d


def call(x=(1, 4, 5, 5), weight=(6, 4, 3, 3), bias=None, **options):
    x = torch.randn(x) if isinstance(x, tuple) else x
    weight = torch.randn(weight) if isinstance(weight, tuple) else weight
    return nested_conv2d(x, weight, bias, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(4, 5, 5)), r"x must be \[N, i, H, W\].*got \[4, 5, 5\]"),
        (dict(weight=(6, 4, 3)), r"weight \[O, I / groups, kh, kw\].*and \[6, 4, 3\]"),
        (dict(bias=torch.randn(5)), r"bias must be \[6\].*got \[5\]"),
        (dict(bias=torch.randn(6).double()), "must share one dtype, got .*float64"),
        (dict(x=torch.randn(1, 4, 5, 5).double()), "must share one dtype"),
        (dict(weight=torch.randn(6, 4, 3, 3, device="meta")), "weight must be on the device of x"),
        (dict(x=(1, 3, 5, 5)), "x must have the 4 selected input channels, got 3"),
        (dict(in_range=(0, 2)), "x must have the 2 selected input channels, got 4"),
        (dict(in_range=(2, 6)), r"in_range must be .* <= 4, got \(2, 6\)"),
        (dict(out_range=(3, 3)), r"out_range must be .*lo < hi <= 6, got \(3, 3\)"),
        (dict(out_range=(-1, 3)), r"out_range must be .*got \(-1, 3\)"),
        (dict(out_range=(1, 2, 3)), r"out_range must be \(lo, hi\), got \(1, 2, 3\)"),
        (
            dict(in_range=(0, 4), in_index=torch.arange(4)),
            "in_range and in_index must not both be given",
        ),
        (dict(out_index=torch.tensor([0, 6])), "out_index must name channels 0 to 5"),
        (dict(out_index=torch.tensor([0, -1])), "out_index must name channels 0 to 5"),
        (dict(out_index=torch.tensor([2, 2])), r"must not name a channel twice, got \[2, 2\]"),
        (dict(out_index=torch.zeros(0, dtype=torch.int64)), "name at least one channel"),
        (dict(out_index=torch.zeros(2, 2, dtype=torch.int64)), "out_index must be 1-D"),
        (dict(groups=4), "groups must be at least 1 and divide the weight's 6 output channels"),
        (dict(groups=0), "groups must be at least 1"),
        (
            dict(weight=(6, 2, 3, 3), groups=2, in_range=(0, 2), out_range=(3, 6)),
            "must cover the same whole groups of 2 and 3 channels",
        ),
        (
            dict(weight=(6, 2, 3, 3), groups=2, out_index=torch.arange(3)),
            "groups must be 1 with an index",
        ),
        (dict(stride=0), "stride must be at least 1, got 0"),
        # Positions that do not fit into 64 bits, with an output of one position.
        (
            dict(stride=2**61, padding=2**60, dilation=2**60),
            f"stride must be at most {2**31 - 1}, got {2**61}",
        ),
        (dict(stride=(1, 2, 3)), r"stride must be an int or two ints, got \(1, 2, 3\)"),
        (dict(padding=-1), "padding must be at least 0, got -1"),
        (dict(padding="full"), 'padding must be ints, "same" or "valid"'),
        (dict(padding="same", stride=2), 'padding "same" must come with stride 1'),
        (dict(dilation=3), "x must be at least as large as the kernel"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"nested_conv2d: .*{message}"):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1, 2]), "x must be a tensor, got list"),
        (dict(weight=3), "weight must be a tensor, got int"),
        (dict(bias=3), "bias must be a tensor or None, got int"),
        (dict(x=torch.zeros(1, 4, 5, 5, dtype=torch.int32)), "x must be a floating-point tensor"),
        (dict(in_index=[0, 1]), "in_index must be an int32 or int64 tensor, got list"),
        (dict(in_index=torch.rand(2)), "in_index must be an int32 or int64 tensor, got .*float32"),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"nested_conv2d: .*{message}"):
        call(**arguments)


def test_a_changed_index_is_checked_again():
    index = torch.tensor([0, 1, 2, 3])
    call(in_index=index)
    index[0] = 9
    with pytest.raises(ValueError, match="in_index must name channels 0 to 3"):
        call(in_index=index)


def test_backends_are_asked_for_by_name():
    with pytest.raises(ValueError, match="backend: name must be one of reference, torch"):
        pyeff.backend("cudnn").__enter__()
    with pyeff.backend("triton"), pytest.raises((ValueError, RuntimeError), match="triton"):
        call()
    with pyeff.backend("cuda"), pytest.raises(ValueError, match="cuda must get CUDA tensors"):
        call()
    with pytest.raises(ValueError, match="isa: name must be generic, avx2, avx512 or amx"):
        pyeff.isa("sse2").__enter__()


def test_instruction_set_is_restored():
    before = pyeff.info()["isa"]
    with pyeff.isa("generic"):
        assert pyeff.info()["isa"] == "generic"
        with pyeff.isa(before):
            assert pyeff.info()["isa"] == before
        assert pyeff.info()["isa"] == "generic"
    assert pyeff.info()["isa"] == before
