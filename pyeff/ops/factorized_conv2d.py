"""A pair of 1-D convolutions, n x 1 and 1 x n, with everything around them in one call."""

from torch import Tensor

from pyeff.ops._dispatch import winograd_allowed
from pyeff.ops._eager import is_plain
from pyeff.ops._factorized_backends import OP, Call, Tensors, planned
from pyeff.ops._factorized_op import run
from pyeff.ops._factorized_pair import ACTIVATIONS, FactorPair, taps_of
from pyeff.ops._known_calls import KnownCalls
from pyeff.ops._tensor_args import check_tensor, check_together, require


def factorized_conv2d(
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    b_second: Tensor | None,
    *,
    stride: int = 1,
    padding: int | str = "same",
    dilation: int = 1,
    inner: str | None = "relu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    outer: str | None = None,
) -> Tensor:
    r"""Convolves along one axis, then along the other; the map between the two is never kept.

    .. math::
        v = \mathrm{inner}(W_1 * x + b_1), \quad
        y = \mathrm{outer}(a \cdot (W_2 * v + b_2) + c + r)

    Args:
        x: Input, ``[N, C, H, W]``. Best in channels_last; other layouts are converted once.
        w_first: Weight :math:`W_1`, vertical ``[L, C, n, 1]`` or horizontal ``[L, C, 1, n]``, n
            odd; dtype and device of ``x``, as for all tensors here.
        b_first: Bias :math:`b_1`, ``[L]``, or None.
        w_second: Weight :math:`W_2` along the other axis, ``[F, L, 1, n]`` or ``[F, L, n, 1]``.
        b_second: Bias :math:`b_2`, ``[F]``, or None.
        stride: One int s: (s, 1) for the vertical convolution, (1, s) for the horizontal one.
        padding: One int p, (p, 0) and (0, p), in pixels; "same", p = dilation * (n // 2), whatever
            the stride is (H' = ceil(H / s)); or "valid".
        dilation: One int d: (d, 1) and (1, d).
        inner: Activation between the two: None, "relu", "relu6", "silu" or "hardswish".
        scale: Factor :math:`a` for each output channel, such as a folded norm's, ``[F]``, or None.
        shift: Summand :math:`c` for each output channel, ``[F]``, or None.
        residual: Map :math:`r` that is added, ``[N, F, H', W']``, or None; it may be ``x``.
        outer: Activation at the end, as ``inner``.

    Returns:
        ``[N, F, H', W']``, channels_last, dtype and device of ``x``; aliases nothing.

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit together.
        TypeError: If an argument is no tensor, or not of a floating-point dtype.

    Twice differentiable in every tensor. The backward computes the map between the convolutions
    again instead of storing it; it stores its inputs, and with an outer relu or relu6 the result.
    Deterministic. The CPU kernels may compute a 3-tap convolution by Winograd's F(4, 3) in float32
    and by F(2, 3) in bfloat16, which ``pyeff.winograd`` turns off; what is not finite then reaches
    every pixel of the groups of four, or two, that read it, as NaN.

    Source: Alvarez and Petersson, "DecomposeMe: Simplifying ConvNets for End-to-End Learning",
    2016; Romera et al., "ERFNet: Efficient Residual Factorized ConvNet for Real-Time Semantic
    Segmentation", T-ITS 2018, section III.

    Example:
        >>> first, second = torch.randn(32, 16, 3, 1), torch.randn(64, 32, 1, 3)
        >>> x = torch.randn(1, 16, 24, 40)
        >>> factorized_conv2d(x, first, None, second, None, stride=2, outer="relu").shape
        torch.Size([1, 64, 12, 20])
    """
    tensors = Tensors(x, w_first, b_first, w_second, b_second, scale, shift, residual)
    plain = is_plain(*tensors)

    def checked() -> FactorPair:
        _check_tensors(tensors)
        pair = _pair(tensors, stride, padding, dilation, inner, outer)
        _check_shapes(tensors, pair)
        return pair.with_taps_near(tensors.x.shape, taps_of(tensors.w_first))

    if plain:
        options = (stride, padding, dilation, inner, outer, winograd_allowed())
        call = _known.get(tensors, options, lambda: planned(tensors, checked()))
    else:
        call = Call(checked(), None)
    return run(tensors, call, plain=plain)


_known: KnownCalls[Call] = KnownCalls()
# A position times a larger one would not fit into 64 bits.
_LARGEST = 2**31 - 1


def _check_tensors(tensors: Tensors) -> None:
    x, w_first, b_first, w_second, b_second, scale, shift, residual = tensors
    check_tensor(OP, "x", x, {4: "[N, C, H, W]"})
    check_tensor(OP, "w_first", w_first, {4: "[L, C, n, 1] or [L, C, 1, n]"})
    check_tensor(OP, "w_second", w_second, {4: "[F, L, 1, n] or [F, L, n, 1]"})
    _check_kernels(w_first, w_second)
    middle, channels = w_first.shape[0], w_second.shape[0]
    _check_vector("b_first", b_first, middle)
    for name, vector in (("b_second", b_second), ("scale", scale), ("shift", shift)):
        _check_vector(name, vector, channels)
    if residual is not None:
        check_tensor(OP, "residual", residual, {4: "[N, F, H', W']"})
    check_together(OP, "x", x, **dict(list(tensors._asdict().items())[1:]))


def _check_kernels(w_first: Tensor, w_second: Tensor) -> None:
    """One way each, and as many taps."""
    for name, weight in (("w_first", w_first), ("w_second", w_second)):
        taps = taps_of(weight)
        if 1 not in weight.shape[2:] or taps % 2 == 0:
            raise ValueError(
                f"{OP}: {name} must have a kernel n x 1 or 1 x n with odd n, "
                f"got {list(weight.shape)}"
            )
    expected = (w_first.shape[3], w_first.shape[2])
    if tuple(w_second.shape[2:]) != expected:
        raise ValueError(
            f"{OP}: w_second must have the kernel {expected[0]} x {expected[1]}, across that of "
            f"w_first, got {list(w_second.shape)}"
        )
    for name, weight in (("w_first", w_first), ("w_second", w_second)):
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            raise ValueError(f"{OP}: {name} must have channels, got {list(weight.shape)}")


def _check_vector(name: str, vector: object, size: int) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"{OP}: {name} must be a tensor or None, got {type(vector).__name__}")
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{OP}: {name} must be [{size}], got {list(vector.shape)}")


def _pair(
    tensors: Tensors,
    stride: int,
    padding: int | str,
    dilation: int,
    inner: str | None,
    outer: str | None,
) -> FactorPair:
    for name, value, minimum in (("stride", stride, 1), ("dilation", dilation, 1)):
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{OP}: {name} must be one int, at least {minimum}, got {value!r}")
    if padding == "same":
        padding = dilation * (taps_of(tensors.w_first) // 2)
    elif padding == "valid":
        padding = 0
    elif not isinstance(padding, int) or padding < 0:
        raise ValueError(
            f'{OP}: padding must be one int, at least 0, "same" or "valid", got {padding!r}'
        )
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if value > _LARGEST:
            raise ValueError(f"{OP}: {name} must be at most {_LARGEST}, got {value}")
    for name, activation in (("inner", inner), ("outer", outer)):
        if activation not in ACTIVATIONS:
            names = ", ".join(str(a) for a in ACTIVATIONS)
            raise ValueError(f"{OP}: {name} must be one of {names}, got {activation!r}")
    return FactorPair(stride, padding, dilation, inner, outer)


def _check_shapes(tensors: Tensors, pair: FactorPair) -> None:
    x, w_first, _, w_second, _, _, _, residual = tensors
    channels, middle = w_first.shape[1], w_first.shape[0]
    require(
        OP,
        x.shape[1] == channels,
        lambda: f"x must have the {channels} input channels of w_first, got {x.shape[1]}",
    )
    require(
        OP,
        w_second.shape[1] == middle,
        lambda: (
            f"w_second must have the {middle} output channels of w_first as inputs, "
            f"got {w_second.shape[1]}"
        ),
    )
    require(
        OP,
        x.shape[2] > 0 and x.shape[3] > 0,
        lambda: f"x must have at least one pixel, got {list(x.shape)}",
    )
    height, width = pair.output_size(x.shape, taps_of(w_first))
    require(
        OP,
        height > 0 and width > 0,
        lambda: (
            f"x must be at least as large as the kernels, got {list(x.shape)} for "
            f"{taps_of(w_first)} taps, padding {pair.padding} and dilation {pair.dilation}"
        ),
    )
    if residual is not None:
        expected = (x.shape[0], w_second.shape[0], height, width)
        for size, wanted in zip(residual.shape, expected, strict=True):
            require(
                OP,
                size == wanted,
                lambda: (
                    f"residual must be like the result, {list(expected)}, "
                    f"got {list(residual.shape)}"
                ),
            )
