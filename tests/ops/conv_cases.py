"""Convolution problems that every backend of nested_conv2d has to solve."""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A full layer, the part of it that is active, and an input for that part."""

    n: int = 2
    channels: int = 8  # of the full layer
    outputs: int = 8
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    in_range: tuple[int, int] | None = None
    out_range: tuple[int, int] | None = None
    in_index: tuple[int, ...] | None = None
    out_index: tuple[int, ...] | None = None
    stride: int | tuple[int, int] = 1
    padding: int | str | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True

    @property
    def active(self) -> int:
        """How many input channels take part."""
        if self.in_index is not None:
            return len(self.in_index)
        lo, hi = self.in_range or (0, self.channels)
        return hi - lo

    def options(self, device="cpu"):
        """The keyword arguments of the call."""
        index = {
            name: torch.tensor(value, device=device)
            for name in ("in_index", "out_index")
            if (value := getattr(self, name)) is not None
        }
        return dict(
            in_range=self.in_range,
            out_range=self.out_range,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            **index,
        )

    def tensors(self, dtype, device="cpu"):
        """x, weight and bias (or None), with outputs of about unit size."""
        fan_in = self.channels // self.groups * self.kernel[0] * self.kernel[1]
        shape = (self.outputs, self.channels // self.groups, *self.kernel)
        x = torch.randn(self.n, self.active, *self.size, device=device).to(dtype)
        weight = (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)
        bias = torch.randn(self.outputs, device=device).to(dtype) if self.bias else None
        return x, weight, bias


CASES = {
    "small, no two dimensions equal": Case(3, 5, 7, (4, 6)),
    "all ones": Case(1, 1, 1, (1, 1), (1, 1)),
    "padded, prefix of both sides": Case(
        2, 16, 16, (8, 8), in_range=(0, 4), out_range=(0, 12), padding=1
    ),
    "interval in the middle, not aligned to a vector": Case(
        2, 24, 40, (7, 9), in_range=(5, 18), out_range=(3, 37), padding=1
    ),
    "more outputs than a panel, odd tail": Case(1, 35, 70, (6, 5), padding=1),
    "range across two panels": Case(1, 8, 80, (6, 5), out_range=(20, 60), padding=1),
    "wide row, several pixel tiles": Case(1, 6, 33, (3, 47), padding=1),
    "1x1": Case(2, 20, 36, (5, 7), (1, 1), in_range=(4, 20), out_range=(0, 18)),
    "1x1 strided": Case(2, 20, 36, (5, 7), (1, 1), in_range=(4, 20), stride=2),
    # Of the gradient of one row or column there is one phase, whatever the stride.
    "1x1 strided over one pixel": Case(5, 24, 33, (1, 1), (1, 1), stride=2),
    "1x1 strided over one row": Case(3, 8, 33, (1, 9), (1, 1), stride=(3, 1)),
    "1x3 strided over one column": Case(1, 17, 16, (10, 1), (1, 3), stride=(1, 2), padding=(0, 1)),
    "stride 2": Case(2, 9, 10, (9, 8), padding=1, stride=2, in_range=(2, 9)),
    "stride 3 and 2, uneven padding": Case(1, 4, 5, (11, 9), padding=(2, 0), stride=(3, 2)),
    "dilated": Case(1, 6, 6, (9, 11), padding=4, dilation=(3, 4)),
    "stride and dilation": Case(1, 5, 6, (13, 12), padding=2, stride=2, dilation=2),
    "same": Case(1, 6, 6, (5, 6), padding="same", dilation=2),
    "same, even kernel": Case(1, 6, 6, (5, 6), (2, 4), padding="same"),
    "valid": Case(1, 6, 6, (5, 6), (3, 2), padding="valid"),
    "3x1": Case(1, 6, 9, (7, 6), (3, 1), padding=(1, 0)),
    "1x5": Case(1, 6, 9, (7, 6), (1, 5), padding=(0, 2)),
    "7x7 stem": Case(1, 3, 16, (18, 20), (7, 7), padding=3, stride=2),
    "no bias": Case(2, 8, 8, bias=False),
    "index on both sides": Case(2, 12, 10, in_index=(11, 0, 5, 4), out_index=(3, 9, 1), padding=1),
    "index in, range out": Case(
        2, 12, 40, in_index=(1, 8, 3), out_range=(4, 39), padding=1, stride=2
    ),
    "range in, index out": Case(
        1, 12, 40, in_range=(3, 9), out_index=tuple(range(39, 2, -1)), padding=1
    ),
    "groups": Case(2, 12, 18, groups=3, padding=1),
    "whole groups in the middle": Case(
        2, 16, 24, groups=4, in_range=(4, 12), out_range=(6, 18), padding=1, stride=2
    ),
    "depth-wise": Case(
        2, 20, 20, (6, 7), groups=20, in_range=(2, 19), out_range=(2, 19), padding=1
    ),
    "depth-wise strided and dilated": Case(
        2, 20, 20, (9, 8), groups=20, padding=2, stride=2, dilation=2
    ),
    "depth-wise, two outputs a channel": Case(
        1, 6, 12, groups=6, in_range=(1, 5), out_range=(2, 10), padding=1
    ),
    "empty batch": Case(0, 8, 8, padding=1),
    "one image, large": Case(1, 64, 64, (14, 14), in_range=(0, 32), out_range=(0, 32), padding=1),
}


def random_case(seed: int) -> Case:
    """Any legal problem of small size."""
    r = random.Random(seed)
    groups = r.choice([1, 1, 1, 2, 3])
    per_in, per_out = r.randint(1, 9), r.randint(1, 20)
    if r.random() < 0.2:
        groups, per_in, per_out = r.randint(2, 40), 1, 1
    kernel = (r.randint(1, 4), r.randint(1, 4))
    dilation = (r.randint(1, 2), r.randint(1, 3))
    padding = (r.randint(0, 3), r.randint(0, 2))
    # At least one position of the kernel fits.
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + r.randint(0, 9)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    lo, hi = sorted(r.sample(range(groups + 1), 2)) if groups > 1 else (0, 1)
    if groups > 1:
        ranges = ((lo * per_in, hi * per_in), (lo * per_out, hi * per_out))
    else:
        ranges = tuple(tuple(sorted(r.sample(range(c + 1), 2))) for c in (per_in, per_out))
    return Case(
        n=r.randint(0, 3),
        channels=groups * per_in,
        outputs=groups * per_out,
        size=size,
        kernel=kernel,
        in_range=ranges[0],
        out_range=ranges[1],
        stride=(r.randint(1, 3), r.randint(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=r.random() < 0.7,
    )
