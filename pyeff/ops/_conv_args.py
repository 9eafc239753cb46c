"""Arguments that every convolution operator has, brought into one form and checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # top, bottom, left, right

# No map of a larger one fits into memory, and a position times one would not fit into 64 bits.
_LARGEST = 2**31 - 1


def pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> Pair:
    """An int or two of them as (height, width), each at least ``minimum`` and below 2^31."""
    if isinstance(value, int):
        result = (value, value)
    else:
        if len(value) != 2 or not all(isinstance(v, int) for v in value):
            raise ValueError(f"{op}: {name} must be an int or two ints, got {value!r}")
        result = (value[0], value[1])
    if result[0] < minimum or result[1] < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value!r}")
    if max(result) > _LARGEST:
        raise ValueError(f"{op}: {name} must be at most {_LARGEST}, got {value!r}")
    return result


def padding_sides(
    op: str, padding: int | str | Sequence[int], kernel: Pair, stride: Pair, dilation: Pair
) -> Sides:
    """Padding as torch.nn.Conv2d takes it, as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f'{op}: padding must be ints, "same" or "valid", got {padding!r}')
        if stride != (1, 1):
            raise ValueError(f'{op}: padding "same" must come with stride 1, got stride {stride}')
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (height // 2, height - height // 2, width // 2, width - width // 2)
    h, w = pair(op, "padding", padding, 0)
    return (h, h, w, w)


def output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """How many positions a kernel has along one side."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def as_channels_last(t: Tensor) -> Tensor:
    """``t`` itself where its channels lie side by side (other strides are free), else a copy."""
    if t.stride(1) == 1 or t.shape[1] == 1:
        return t
    if t.numel() == 0:  # which contiguous() returns as it is
        return empty_channels_last(t, *t.shape)
    return t.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised [n, c, h, w] with the dtype and device of ``like``."""
    # Twice as fast as torch.empty(memory_format=torch.channels_last), and a size of one or zero
    # does not change the strides.
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def tf32_allowed() -> bool:
    """Whether torch lets convolutions round float32 factors to TF32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at run time
    return bool(convolutions.fp32_precision == "tf32")
