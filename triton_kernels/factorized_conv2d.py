"""factorized_conv2d on the GPU: the launchers of its Triton kernels.

The arguments are validated by ``pyeff.ops``; here they only become grids and strides. Nothing waits
for the device, so every launcher can be captured in a CUDA graph once a first call has compiled its
kernels. Inputs may have any strides; channels_last is read fastest. A weight whose input channels
are not innermost is copied so once a call.

The forward runs as one kernel, or as two with an epilogue each; :func:`can_fuse` says where there
is a choice, and the caller makes it. The backward computes the middle map again, and holds that and
its gradient at most. Every launcher takes ``tile`` to override the table's choice: for tests and
tuning.
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from pyeff.triton_kernels import nested_conv2d
from pyeff.triton_kernels.factorized_conv2d_line import (
    factorized_line_forward_kernel,
    factorized_line_grad_input_kernel,
)
from pyeff.triton_kernels.factorized_conv2d_pair import factorized_pair_kernel
from pyeff.triton_kernels.nested_conv2d_layer import (
    INT32_MAX,
    blocks,
    empty_channels_last,
    output_size,
)
from pyeff.triton_kernels.tiles import (
    Tile,
    arithmetic,
    choose,
    choose_pair,
    fit_depth,
    product_precision,
    widest_pair,
)
from torch import Tensor
from triton import next_power_of_2

_OP = "factorized_conv2d"
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")
# Both are known from the result alone.
_FROM_RESULT = (None, "relu", "relu6")


class Epilogue(NamedTuple):
    """What follows a convolution, in this order; each may be None."""

    bias: Tensor | None = None  # [K]
    scale: Tensor | None = None  # [K]
    shift: Tensor | None = None  # [K]
    residual: Tensor | None = None  # [N, K, P, Q]
    activation: str | None = None


class Window(NamedTuple):
    """Where the taps of both convolutions lie on their axes."""

    stride: int
    padding: int
    dilation: int


def can_fuse(w_first: Tensor, w_second: Tensor, window: Sequence[int]) -> bool:
    """Whether the fused kernel takes these weights ``[L, C, n, 1]`` and ``[F, L, 1, n]``."""
    taps = w_first.shape[2] * w_first.shape[3]
    widest = max(w_first.shape[0], w_second.shape[0])
    return taps == 3 and window[0] == 1 and widest <= widest_pair(w_first.dtype, w_first.device)


def forward(
    x: Tensor,  # [N, C, H, W]
    w_first: Tensor,  # [L, C, n, 1] or [L, C, 1, n]
    b_first: Tensor | None,  # [L]
    w_second: Tensor,  # [F, L, 1, n] or [F, L, n, 1]
    epilogue: Epilogue,
    window: Sequence[int],
    inner: str | None,
    precision: str | None = None,
    *,
    fused: bool,
    tile: Tile | None = None,
    segment: int | None = None,
) -> Tensor:  # [N, F, H', W']
    """f(scale * (second(g(first(x) + b_first)) + bias) + shift + residual), g = ``inner``.

    Args:
        x: ``[N, C, H, W]``; float16, bfloat16 or float32.
        w_first: First weight, dtype of ``x``.
        b_first: First bias or None.
        w_second: Second weight, across the first.
        epilogue: What follows the second convolution.
        window: ``(stride, padding, dilation)`` of both.
        inner: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        precision: Products of float32: ``"tf32"`` or ``"ieee"``; None follows
            ``torch.backends.cudnn.conv.fp32_precision``, as torch's own convolution does.
        fused: One kernel, or two; two where its pixels cannot be numbered by 32 bits.
        tile: Instead of the table's choice.
        segment: Pixels that a program of the fused kernel walks over; default: as many as leave
            every multiprocessor a program.

    Returns:
        ``[N, F, H', W']``, channels_last, dtype and device of ``x``. Deterministic.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` or an activation is unknown, or ``fused`` cannot be.
    """
    precision = product_precision(_OP, x.dtype, precision)
    for name, activation in (("inner", inner), ("outer", epilogue.activation)):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{_OP}: {name} must be one of {ACTIVATIONS}, got {activation!r}")
    if fused and not can_fuse(w_first, w_second, window):
        raise ValueError(
            f"{_OP}: fused must be False for weights {list(w_first.shape)} and "
            f"{list(w_second.shape)} of {x.dtype} with stride {window[0]}, got True"
        )
    window = Window(*window)
    if fused and _positions(x, w_first, window, segment) <= INT32_MAX:
        return _pair(
            x, w_first, b_first, w_second, epilogue, window, inner, (precision, tile, segment)
        )
    first = Epilogue(b_first, activation=inner)
    middle = _line(x, w_first, first, window, precision, tile)
    return _line(middle, w_second, epilogue, window, precision, tile, not _is_vertical(w_first))


def backward(
    grad: Tensor,  # [N, F, H', W']
    x: Tensor,  # [N, C, H, W]
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    window: Sequence[int],
    inner: str | None,
    wanted: Sequence[bool],
    precision: str | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_first, b_first, w_second and of its bias, those that are wanted.

    Args:
        grad: Gradient of the second convolution's result (before the epilogue), any strides.
        x: As in the forward.
        w_first: As in the forward.
        b_first: As in the forward.
        w_second: As in the forward.
        window: As in the forward.
        inner: As in the forward.
        wanted: One for each gradient.
        precision: As in the forward.
        tile: Instead of the table's choice, of the convolutions and the gradients of maps.

    Returns:
        Gradients of the arguments' shapes, maps and weights channels_last; None where none is
        wanted. Sums are float32 in a fixed order: deterministic for one device.

    Raises:
        TypeError: ``x`` is neither float16, bfloat16 nor float32.
        ValueError: ``precision`` is unknown.
    """
    precision = product_precision(_OP, x.dtype, precision)
    window, vertical = Window(*window), _is_vertical(w_first)
    through = any(wanted[:3])
    grad_b_second = _sum_over_pixels(grad) if wanted[4] else None
    if not through and not wanted[3]:
        return None, None, None, None, grad_b_second
    kept = inner if inner in _FROM_RESULT else None
    before = _line(x, w_first, Epilogue(b_first, activation=kept), window, precision, tile)
    grad_w_second = None
    if wanted[3]:
        middle = before if inner in _FROM_RESULT else _activate(before, inner)
        grad_w_second = _grad_weight(grad, middle, w_second, window, not vertical, precision)
        del middle
    if not through:
        return None, None, None, grad_w_second, grad_b_second
    grad_middle = _line_grad_input(
        grad, w_second, before.shape, window, not vertical, (before, inner), precision, tile
    )
    del before
    grad_x = grad_w_first = None
    if wanted[0]:
        grad_x = _line_grad_input(
            grad_middle, w_first, x.shape, window, vertical, (None, None), precision, tile
        )
    if wanted[1]:
        grad_w_first = _grad_weight(grad_middle, x, w_first, window, vertical, precision)
    grad_b_first = _sum_over_pixels(grad_middle) if wanted[2] else None
    return grad_x, grad_w_first, grad_b_first, grad_w_second, grad_b_second


def _activate(before: Tensor, name: str | None) -> Tensor:
    return getattr(torch.nn.functional, str(name))(before)


def _sum_over_pixels(maps: Tensor) -> Tensor:
    return maps.sum(dim=(0, 2, 3))


def _is_vertical(weight: Tensor) -> bool:
    return weight.shape[3] == 1


def _sides(window: Window, vertical: bool) -> tuple[tuple[int, ...], ...]:
    """Stride, padding (top, bottom, left, right) and dilation of one of the two."""
    s, p, d = window
    if vertical:
        return (s, 1), (p, p, 0, 0), (d, 1)
    return (1, s), (0, 0, p, p), (1, d)


def _grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, window: Window, vertical: bool, precision: str
) -> Tensor:
    outputs, inputs = weight.shape[:2]
    return nested_conv2d.grad_weight(
        grad, x, weight.shape, (0, inputs), (0, outputs), *_sides(window, vertical), 1, precision
    )


def _taps_innermost(weight: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The weight with its input channels innermost, and its strides (output, input, tap)."""
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        weight = weight.contiguous(memory_format=torch.channels_last)
    o, i, r, s = weight.stride()
    return weight, (o, i, r if weight.shape[2] > 1 else s)


def _vectors(epilogue: Epilogue) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in epilogue[:3]]


def _strides(maps: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if maps is None else maps.stride()


def _line(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    window: Window,
    precision: str,
    tile: Tile | None,
    vertical: bool | None = None,
) -> Tensor:
    """One convolution with its epilogue."""
    vertical = _is_vertical(weight) if vertical is None else vertical
    (N, C, H, W), K, taps = x.shape, weight.shape[0], weight.shape[2] * weight.shape[3]
    s, p, d = window
    P = output_size(H, 2 * p, taps, s, d) if vertical else H
    Q = W if vertical else output_size(W, 2 * p, taps, s, d)
    y = empty_channels_last((N, K, P, Q), x)
    if y.numel() == 0:
        return y
    pixels = N * P * Q
    tile = tile or choose("gemm", arithmetic(x.dtype, precision), x.device, pixels, K, 1)
    tile = fit_depth(tile, C)
    weight, weight_strides = _taps_innermost(weight)
    with torch.cuda.device_of(x):
        factorized_line_forward_kernel[(blocks(pixels, tile.rows) * blocks(K, tile.cols),)](
            x, weight, *_vectors(epilogue), epilogue.residual, y,
            pixels, P * Q, Q, H, W, C, K,
            *x.stride(), *weight_strides, *_strides(epilogue.residual), s, p, d,
            taps, vertical, epilogue.activation or "none", precision,
            pixels + tile.rows > INT32_MAX, tile.rows, tile.cols, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _line_grad_input(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    window: Window,
    vertical: bool,
    activation: tuple[Tensor | None, str | None],
    precision: str,
    tile: Tile | None,
) -> Tensor:
    """Gradient of a convolution's input, times the derivative of an activation at a map."""
    grad_x = empty_channels_last(shape, grad)
    if grad_x.numel() == 0:
        return grad_x
    at, name = activation
    (N, C, H, W), K, taps = shape, weight.shape[0], weight.shape[2] * weight.shape[3]
    s, p, d = window
    class_h, class_w = (blocks(H, s), W) if vertical else (H, blocks(W, s))
    # A stride beyond the map leaves classes without a pixel.
    classes = min(s, H if vertical else W)
    pixels, common = N * class_h * class_w, gcd(s, d)
    kind = arithmetic(grad.dtype, precision)
    tile = tile or choose("gemm", kind, grad.device, pixels, C, classes)
    tile = fit_depth(tile, K)
    weight, weight_strides = _taps_innermost(weight)
    grid = classes * blocks(pixels, tile.rows) * blocks(C, tile.cols)
    with torch.cuda.device_of(grad):
        factorized_line_grad_input_kernel[(grid,)](
            grad, weight, at if name else None, grad_x,
            pixels, class_h * class_w, class_w, *grad.shape[2:], H, W, C, K,
            *grad.stride(), *weight_strides, *_strides(at), s, p, d, s // common, d // common,
            taps, vertical, name or "none", precision,
            pixels + tile.rows > INT32_MAX, tile.rows, tile.cols, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return grad_x


def _positions(x: Tensor, w_first: Tensor, window: Window, segment: int | None) -> int:
    """The largest number of a line or of a pixel that the fused kernel counts to."""
    across, along = x.shape[2:] if _is_vertical(w_first) else (x.shape[3], x.shape[2])
    _, p, d = window
    rows, cols = (output_size(size, 2 * p, 3, 1, d) for size in (across, along))
    steps = blocks(cols, d)
    # The last segment may end past its lines; the last block of lines past all of them.
    walked = steps + max(steps, segment or 0, 4) + 2
    return max(x.shape[0] * rows * d + 512, walked * d)


def _pair(
    x: Tensor,
    w_first: Tensor,
    b_first: Tensor | None,
    w_second: Tensor,
    epilogue: Epilogue,
    window: Window,
    inner: str | None,
    how: tuple[str, Tile | None, int | None],
) -> Tensor:
    """Both convolutions in one kernel."""
    precision, tile, segment = how
    (N, C, H, W), L, K = x.shape, w_first.shape[0], w_second.shape[0]
    p, d = window.padding, window.dilation
    P, Q = (output_size(size, 2 * p, 3, 1, d) for size in (H, W))
    y = empty_channels_last((N, K, P, Q), x)
    if y.numel() == 0:
        return y
    vertical = _is_vertical(w_first)
    B, A, B_out, A_out = (H, W, P, Q) if vertical else (W, H, Q, P)
    lines = N * B_out * d
    kind = arithmetic(x.dtype, precision)
    tile, fitting = choose_pair(kind, x.device, tile, max(L, K), lines, blocks(A_out, d))
    tile, segment = fit_depth(tile, C), segment or fitting
    segments = blocks(blocks(A_out, d), segment)
    (w_first, first_strides), (w_second, second_strides) = map(_taps_innermost, (w_first, w_second))
    b_first = None if b_first is None else b_first.contiguous()

    def along(maps: Tensor | None) -> tuple[int, ...]:
        n, c, h, w = _strides(maps)
        return (n, c, h, w) if vertical else (n, c, w, h)

    y_n, _, y_b, y_a = along(y)
    with torch.cuda.device_of(x):
        factorized_pair_kernel[(blocks(lines, tile.rows) * segments,)](
            x, w_first, b_first, w_second, *_vectors(epilogue), epilogue.residual, y,
            lines, segment, segments, A, B, A_out, B_out, C, L, K,
            *along(x), *first_strides, *second_strides, *along(epilogue.residual),
            y_n, y_b, y_a, p, d,
            inner or "none", epilogue.activation or "none", precision,
            tile.rows, _block(L), _block(K), tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _block(channels: int) -> int:
    return max(16, next_power_of_2(channels))
