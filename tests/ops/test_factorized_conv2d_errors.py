"""What factorized_conv2d refuses, and with which words."""

import pytest
import torch

import pyeff
from pyeff.ops import factorized_conv2d

FIRST, SECOND = (6, 4, 3, 1), (5, 6, 1, 3)


def call(x=(2, 4, 5, 7), w_first=FIRST, b_first=None, w_second=SECOND, b_second=None, **options):
    x, w_first, w_second = (
        torch.randn(t) if isinstance(t, tuple) else t for t in (x, w_first, w_second)
    )
    return factorized_conv2d(x, w_first, b_first, w_second, b_second, **options)


def test_the_call_itself_is_accepted():
    assert call().shape == (2, 5, 5, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=(4, 5, 7)), r"x must be \[N, C, H, W\], got \[4, 5, 7\]"),
        (dict(w_first=(6, 4, 3)), r"w_first must be \[L, C, n, 1\] or \[L, C, 1, n\], got \[6, 4"),
        (dict(w_second=(6,)), r"w_second must be \[F, L, 1, n\] or \[F, L, n, 1\], got \[6\]"),
        (
            dict(w_first=(6, 4, 3, 3)),
            r"w_first must have a kernel n x 1 or 1 x n with odd n, got \[6, 4, 3, 3\]",
        ),
        (dict(w_first=(6, 4, 4, 1)), "w_first must have a kernel n x 1 or 1 x n with odd n, got"),
        (dict(w_second=(5, 6, 1, 2)), "w_second must have a kernel n x 1 or 1 x n with odd n"),
        (
            dict(w_second=(5, 6, 3, 1)),
            "w_second must have the kernel 1 x 3, across that of w_first, got",
        ),
        (dict(w_second=(5, 6, 1, 5)), "w_second must have the kernel 1 x 3, across that of w_fi"),
        (dict(w_first=(6, 4, 1, 3)), "w_second must have the kernel 3 x 1, across that of w_fir"),
        (dict(w_first=(0, 4, 3, 1)), r"w_first must have channels, got \[0, 4, 3, 1\]"),
        (dict(w_second=(5, 0, 1, 3)), r"w_second must have channels, got \[5, 0, 1, 3\]"),
        (dict(x=(2, 3, 5, 7)), "x must have the 4 input channels of w_first, got 3"),
        (
            dict(w_second=(5, 7, 1, 3)),
            "w_second must have the 6 output channels of w_first as inputs, got 7",
        ),
        (dict(b_first=torch.randn(5)), r"b_first must be \[6\], got \[5\]"),
        (dict(b_second=torch.randn(6)), r"b_second must be \[5\], got \[6\]"),
        (dict(scale=torch.randn(1)), r"scale must be \[5\], got \[1\]"),
        (dict(shift=torch.randn(5, 1, 1)), r"shift must be \[5\], got \[5, 1, 1\]"),
        (dict(residual=torch.randn(5)), r"residual must be \[N, F, H', W'\], got \[5\]"),
        (
            dict(residual=torch.randn(1, 5, 5, 7)),
            r"residual must be like the result, \[2, 5, 5, 7\], got \[1, 5, 5, 7\]",
        ),
        (dict(stride=0), "stride must be one int, at least 1, got 0"),
        (dict(stride=(1, 2)), r"stride must be one int, at least 1, got \(1, 2\)"),
        (dict(dilation=0), "dilation must be one int, at least 1, got 0"),
        (dict(stride=2**31), "stride must be at most 2147483647, got 2147483648"),
        (dict(padding=2**31), "padding must be at most 2147483647, got 2147483648"),
        (dict(padding=0, dilation=2**40), "dilation must be at most 2147483647, got 1099511627776"),
        (
            dict(w_first=(6, 4, 5, 1), w_second=(5, 6, 1, 5), dilation=2**30),
            "padding must be at most 2147483647, got 2147483648",
        ),
        (dict(dilation=1.5), "dilation must be one int, at least 1, got 1.5"),
        (dict(padding=-1), 'padding must be one int, at least 0, "same" or "valid", got -1'),
        (dict(padding="full"), 'padding must be one int, at least 0, "same" or "valid", got \'f'),
        (dict(padding=[1, 1]), r'padding must be one int, at least 0, "same" or "valid", got \[1'),
        (dict(inner="gelu"), "inner must be one of None, relu, relu6, silu, hardswish, got 'gelu'"),
        (dict(outer="none"), "outer must be one of None, relu, relu6, silu, hardswish, got 'none'"),
        (
            dict(padding="valid", dilation=3),
            r"x must be at least as large as the kernels, got \[2, 4, 5, 7\] for 3 taps, padding 0",
        ),
        (dict(x=(2, 4, 2, 7), padding=0), "x must be at least as large as the kernels"),
        (dict(x=(2, 4, 0, 7)), r"x must have at least one pixel, got \[2, 4, 0, 7\]"),
        (dict(x=(2, 4, 5, 0), padding=2), r"x must have at least one pixel, got \[2, 4, 5, 0\]"),
        (dict(x=torch.randn(2, 4, 5, 7).double()), "w_first must have the dtype of x, .*float64"),
        (dict(scale=torch.randn(5).half()), "scale must have the dtype of x, .*float32, got"),
        (
            dict(residual=torch.randn(2, 5, 5, 7, device="meta")),
            "residual must be on the device of x, cpu, got meta",
        ),
        (
            dict(w_second=torch.randn(SECOND, device="meta")),
            "w_second must be on the device of x, cpu, got meta",
        ),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"factorized_conv2d: .*{message}"):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1, 2]), "x must be a tensor, got list"),
        (dict(w_first=3), "w_first must be a tensor, got int"),
        (dict(w_second=None), "w_second must be a tensor, got NoneType"),
        (dict(b_first=3), "b_first must be a tensor or None, got int"),
        (dict(scale=2.0), "scale must be a tensor or None, got float"),
        (dict(residual=1), "residual must be a tensor, got int"),
        (dict(x=torch.zeros(2, 4, 5, 7, dtype=torch.int32)), "x must be a floating-point tensor"),
    ],
)
def test_refuses_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"factorized_conv2d: .*{message}"):
        call(**arguments)


def test_a_known_call_is_not_taken_for_another():
    """Calls are remembered by their shapes and options: a wrong one after a right one is seen."""
    call(stride=2)
    with pytest.raises(ValueError, match="stride must be one int"):
        call(stride=0)
    with pytest.raises(ValueError, match="residual must be like the result"):
        call(stride=2, residual=torch.randn(2, 5, 5, 7))


def test_backends_are_asked_for_by_name():
    with pyeff.backend("triton"), pytest.raises((ValueError, RuntimeError), match="triton"):
        call()
    with pyeff.backend("cuda"), pytest.raises(ValueError, match="cuda must get CUDA tensors"):
        call()
