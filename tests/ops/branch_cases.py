"""Branch convolutions that every backend has to solve."""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """B branches, k of them for each of n images."""

    n: int = 3
    k: int = 2
    branches: int = 5
    channels: int = 8
    outputs: int = 8
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    shared: bool = True  # one map an image, else one a pair
    stride: int | tuple[int, int] = 1
    padding: int | str | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True
    index: tuple[tuple[int, ...], ...] | None = None  # k different ones of all by default

    def options(self):
        """The keyword arguments of the call."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def routes(self, device="cpu"):
        """index int32 [n, k]."""
        if self.index is not None:
            index = torch.tensor(self.index).reshape(self.n, self.k)
        else:
            index = torch.rand(self.n, self.branches).argsort(1)[:, : self.k]
        return index.to(torch.int32).contiguous().to(device)

    def tensors(self, dtype, device="cpu"):
        """x, weight and bias (or None), with outputs of about unit size."""
        per_group = self.channels // self.groups
        fan_in = per_group * self.kernel[0] * self.kernel[1]
        shape = (self.branches, self.outputs, per_group, *self.kernel)
        rows = (self.n,) if self.shared else (self.n, self.k)
        x = torch.randn(*rows, self.channels, *self.size, device=device).to(dtype)
        weight = (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)
        bias = torch.randn(shape[:2], device=device).to(dtype) if self.bias else None
        return x, weight, bias


CASES = {
    "small, no two dimensions equal": Case(3, 2, 6, 5, 7, (4, 8)),
    "all ones": Case(1, 1, 1, 1, 1, (1, 1), (1, 1)),
    "a map for each pair": Case(3, 2, 6, 5, 7, (4, 8), shared=False),
    "cifar branch": Case(5, 4, 20, 16, 16, (8, 8), padding=1),
    "cifar branch, strided entry": Case(4, 4, 20, 32, 16, (16, 16), padding=1, stride=2),
    "cifar branch, pairs": Case(4, 4, 20, 16, 16, (8, 8), shared=False, padding=1),
    "one route": Case(4, 1, 6, 9, 10, padding=1, shared=False),
    "all branches": Case(2, 5, 5, 9, 10, padding=1),
    "one image": Case(1, 3, 7, 12, 20, (7, 7), padding=1),
    "empty batch": Case(0, 3, 7, padding=1),
    "empty batch of pairs": Case(0, 3, 7, shared=False, padding=1),
    "a branch twice in a row, others never": Case(
        3, 3, 9, index=((4, 4, 1), (1, 4, 1), (8, 8, 8)), padding=1
    ),
    "a branch twice in a row, pairs": Case(
        2, 3, 9, index=((4, 4, 1), (8, 8, 8)), padding=1, shared=False
    ),
    "every image the same branch": Case(6, 1, 4, index=((2,),) * 6, padding=1),
    "more outputs than a panel, odd tail": Case(2, 2, 3, 35, 70, (6, 5), padding=1),
    "wide row, several pixel tiles": Case(1, 2, 3, 6, 33, (3, 47), padding=1),
    "1x1": Case(3, 2, 4, 20, 36, (5, 7), (1, 1)),
    "1x1 strided, pairs": Case(3, 2, 4, 20, 36, (5, 7), (1, 1), stride=2, shared=False),
    "stride 3 and 2, uneven padding": Case(2, 2, 3, 4, 5, (11, 9), padding=(2, 0), stride=(3, 2)),
    "stride 2, one column": Case(
        4, 2, 2, 9, 11, (8, 1), (1, 3), padding=(0, 1), stride=(1, 2), index=((0, 1), (1, 0)) * 2
    ),
    "dilated": Case(2, 2, 3, 6, 6, (9, 11), padding=4, dilation=(3, 4)),
    "stride and dilation, pairs": Case(
        2, 2, 3, 5, 6, (13, 12), padding=2, stride=2, dilation=2, shared=False
    ),
    "same, even kernel": Case(2, 2, 3, 6, 6, (5, 6), (2, 4), padding="same"),
    "same, even kernel, pairs": Case(2, 2, 3, 6, 6, (5, 6), (2, 4), padding="same", shared=False),
    "valid, 3x2": Case(2, 2, 3, 6, 6, (5, 6), (3, 2), padding="valid"),
    "no bias": Case(2, 2, 3, bias=False),
    "groups": Case(2, 2, 3, 12, 18, groups=3, padding=1),
    "groups, pairs": Case(2, 2, 3, 12, 18, groups=3, padding=1, stride=2, shared=False),
    "depth-wise": Case(2, 3, 4, 20, 20, (6, 7), groups=20, padding=1),
    "depth-wise, pairs, strided and dilated": Case(
        2, 2, 4, 37, 37, (9, 8), groups=37, padding=2, stride=2, dilation=2, shared=False
    ),
    "depth-wise, two outputs a channel": Case(2, 2, 3, 6, 12, groups=6, padding=1),
    "wide branch, few images": Case(2, 2, 3, 64, 64, (7, 7), padding=1, shared=False),
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
    n, k, branches = r.randint(0, 4), r.randint(1, 4), r.randint(1, 6)
    return Case(
        n=n,
        k=k,
        branches=branches,
        channels=groups * per_in,
        outputs=groups * per_out,
        size=size,
        kernel=kernel,
        shared=r.random() < 0.5,
        stride=(r.randint(1, 3), r.randint(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=r.random() < 0.7,
        index=tuple(tuple(r.randrange(branches) for _ in range(k)) for _ in range(n)),
    )
