"""Branches that branch_stage has to run."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyeff.ops import BranchPlan


class Maker:
    """A plan and a source of random parameters that keep outputs at about unit size."""

    def __init__(self, branches: int, channels: int, dtype: torch.dtype, vector: bool = False):
        self.plan = BranchPlan(branches, channels, vector=vector)
        self.branches, self.dtype = branches, dtype

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(self.branches, *shape, dtype=torch.float64) * scale).to(self.dtype)

    def conv(self, source, channels, out, kernel=3, *, groups=1, bias=True, **options) -> int:
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        fan_in = channels // groups * size[0] * size[1]
        weight = self.random(out, channels // groups, *size, scale=fan_in**-0.5)
        added = self.random(out, scale=0.1) if bias else None
        return self.plan.conv2d(source, weight, added, groups=groups, **options)

    def conv_act(self, source, channels, out, kernel=3, activation="relu", **options) -> int:
        return self.plan.activation(self.conv(source, channels, out, kernel, **options), activation)

    def norm(self, source, channels) -> int:
        scale, shift = (self.random(channels, scale=0.1) for _ in range(2))
        return self.plan.scale_shift(source, 1 + scale, shift)

    def linear(self, source, features, out, bias=True) -> int:
        added = self.random(out, scale=0.1) if bias else None
        return self.plan.linear(source, self.random(out, features, scale=features**-0.5), added)


def basic_block(m: Maker, x: int, channels: int, out: int, stride: int, shortcut: str) -> int:
    a = m.conv_act(x, channels, out, 3, stride=stride, padding=1)
    a = m.conv(a, out, out, 3, padding=1)
    if shortcut == "projection":
        x = m.conv(x, channels, out, 1, stride=stride)
    elif shortcut == "A":  # every other pixel, channels filled up with zeros
        eye = torch.eye(out, channels, dtype=m.dtype).reshape(1, out, channels, 1, 1)
        x = m.plan.conv2d(x, eye.repeat(m.branches, 1, 1, 1, 1), stride=stride)
    return m.plan.activation(m.plan.add(a, x), "relu")


def residual_stage(m: Maker, channels: int, out: int, stride: int, shortcut: str, blocks=3) -> None:
    x = basic_block(m, 0, channels, out, stride, shortcut)
    for _ in range(blocks - 1):
        x = basic_block(m, x, out, out, 1, "identity")


def bottleneck_stage(m: Maker, channels: int, width: int, out: int) -> None:
    x = 0
    for block in range(2):
        inputs, stride = (channels, 2) if block == 0 else (out, 1)
        a = m.conv_act(x, inputs, width, 1)
        a = m.conv_act(a, width, width, 3, stride=stride, padding=1)
        a = m.conv(a, width, out, 1)
        shortcut = m.conv(x, inputs, out, 1, stride=2) if block == 0 else x
        x = m.plan.activation(m.plan.add(a, shortcut), "relu")


def dense_stage(m: Maker, channels: int, growth: int, layers: int) -> None:
    x = 0
    for _ in range(layers):
        a = m.plan.activation(m.norm(x, channels), "relu")
        a = m.conv(a, channels, 4 * growth, 1, bias=False)
        a = m.plan.activation(m.norm(a, 4 * growth), "relu")
        a = m.conv(a, 4 * growth, growth, 3, padding=1, bias=False)
        x = m.plan.concat([x, a])
        channels += growth
    m.plan.avg_pool2d(m.plan.activation(m.norm(x, channels), "relu"), 2)


def separable_stage(m: Maker, channels: int, out: int, activation: str) -> None:
    a = m.conv_act(0, channels, channels, 3, activation, groups=channels, padding=1, stride=2)
    a = m.conv_act(a, channels, out, 1, activation)
    b = m.conv(a, out, out, 3, groups=out, padding=2, dilation=2)
    b = m.conv(b, out, out, 1)
    m.plan.activation(m.plan.add(b, a), activation)


def tail(m: Maker, channels: int) -> None:
    a = m.conv_act(0, channels, 24, 3, padding=1)
    a = m.plan.max_pool2d(a, 3, stride=2, padding=1)
    a = m.plan.flatten(m.plan.adaptive_pool2d(a))
    a = m.plan.activation(m.linear(a, 24, 40), "hardswish")
    m.linear(a, 40, 7, bias=False)


def pooling(m: Maker, channels: int) -> None:
    a = m.plan.max_pool2d(0, (3, 2), stride=2, padding=1, dilation=(1, 2), ceil_mode=True)
    b = m.plan.avg_pool2d(a, 3, stride=1, padding=1, count_include_pad=False)
    c = m.plan.avg_pool2d(a, 3, stride=1, padding=1)
    d = m.plan.adaptive_pool2d(m.plan.concat([b, c]), (2, 3))
    e = m.plan.adaptive_pool2d(m.plan.concat([c, b]), (2, 3), average=False)
    m.plan.activation(m.plan.add(d, e), "silu")


def groups(m: Maker, channels: int) -> None:
    a = m.conv_act(0, channels, 15, 3, groups=3, padding=1)
    b = m.conv_act(a, 15, 9, (2, 4), "relu6", groups=3, padding="same")
    a = m.plan.add(m.conv(b, 9, channels, 1, groups=3, bias=False), 0)
    m.conv_act(a, channels, 2 * channels, 3, groups=channels, stride=(1, 2), padding=(0, 1))


def crossing(m: Maker, channels: int) -> None:
    """Slots that several steps read, a result that is not the last, a step that nobody reads."""
    a = m.conv(0, channels, 20, 3, padding=1)
    b = m.plan.activation(a, "relu")
    c = m.conv(b, 20, 20, 1)
    m.conv(c, 20, 5, 3)
    d = m.plan.add(c, c)
    e = m.plan.add(m.plan.add(d, a), m.conv(d, 20, 20, 3, padding=1))
    result = m.plan.activation(m.plan.concat([e, b, e]), "relu")
    m.plan.activation(result, "silu")
    m.plan.returns(result)


def mlp(m: Maker, features: int) -> None:
    a = m.plan.activation(m.linear(0, features, features), "relu")
    a = m.plan.add(m.linear(m.norm(a, features), features, features), 0)
    m.plan.concat([m.plan.activation(a, "relu6"), 0])


@dataclass(frozen=True)
class StageCase:
    """A branch, and inputs and routes for it."""

    build: Callable[[Maker], None]
    channels: int
    size: tuple[int, ...] = (9, 7)
    n: int = 3
    branches: int = 5
    k: int = 2

    def make(self, dtype, parameters=None):
        """x [N, C, H, W], an index and the plan."""
        m = Maker(self.branches, self.channels, parameters or dtype, vector=not self.size)
        self.build(m)
        x = torch.randn(self.n, self.channels, *self.size, dtype=torch.float64).to(dtype)
        if self.size:
            x = x.contiguous(memory_format=torch.channels_last)
        index = torch.randint(0, self.branches, (self.n, self.k), dtype=torch.int32)
        return x, index, m.plan


CASES = {
    "CIFAR stage, strided, projection": StageCase(
        lambda m: residual_stage(m, 32, 16, 2, "projection"), 32, (16, 16)
    ),
    "residual stage, option A, odd sizes": StageCase(
        lambda m: residual_stage(m, 12, 20, 2, "A", 2), 12
    ),
    "residual stage, identity shortcuts": StageCase(
        lambda m: residual_stage(m, 16, 16, 1, "identity", 2), 16, (7, 7)
    ),
    "bottleneck stage": StageCase(lambda m: bottleneck_stage(m, 32, 12, 48), 32, (14, 14), n=2),
    "bottleneck stage, uneven channels": StageCase(lambda m: bottleneck_stage(m, 21, 10, 35), 21),
    "DenseNet layers": StageCase(lambda m: dense_stage(m, 18, 6, 3), 18, (8, 6)),
    "separable, relu6": StageCase(lambda m: separable_stage(m, 24, 40, "relu6"), 24),
    "separable, silu": StageCase(lambda m: separable_stage(m, 32, 70, "silu"), 32, (10, 12)),
    "separable, hardswish": StageCase(lambda m: separable_stage(m, 17, 5, "hardswish"), 17),
    "pooling and linear tail": StageCase(lambda m: tail(m, 10), 10),
    "pooling": StageCase(lambda m: pooling(m, 19), 19, (11, 8)),
    "groups": StageCase(lambda m: groups(m, 6), 6),
    "crossing": StageCase(lambda m: crossing(m, 9), 9, (5, 6)),
    "flattened map": StageCase(lambda m: m.linear(m.plan.flatten(0), 60, 8), 5, (3, 4)),
    "vectors": StageCase(lambda m: mlp(m, 23), 23, ()),
    "one step, wide": StageCase(lambda m: m.conv(0, 64, 112, 1), 64, (6, 7)),
    "7x7 kernel on one pixel": StageCase(lambda m: m.conv(0, 3, 4, 7, padding=3), 3, (1, 1)),
    "wide rows": StageCase(lambda m: m.conv_act(0, 8, 16, 3, padding=1), 8, (4, 37)),
    "every branch of every image": StageCase(
        lambda m: residual_stage(m, 16, 16, 1, "identity", 1), 16, (4, 4), branches=4, k=4
    ),
    "one branch": StageCase(lambda m: m.conv_act(0, 8, 8, 1), 8, branches=1, k=1),
    "empty batch": StageCase(lambda m: m.conv_act(0, 8, 8, 3), 8, n=0),
    "one image": StageCase(lambda m: m.conv_act(0, 8, 8, 3), 8, n=1, k=3),
}


def random_case(seed: int) -> StageCase:
    """A branch of any steps that fit each other."""
    r = random.Random(seed)
    channels = r.choice([1, 3, 8, 16, 17, 32])

    def build(m: Maker) -> None:
        # Slot -> channels, height, width
        shapes = {0: (channels, 6, 5)}
        for _ in range(r.randint(1, 9)):
            source = r.choice(list(shapes))
            c, height, width = shapes[source]
            kind = r.choice(["conv"] * 5 + ["act", "norm", "add", "pool", "concat", "depthwise"])
            if kind == "conv":
                kernel, stride = r.choice([1, 2, 3]), r.choice([1, 1, 2])
                out = r.choice([c, 5, 16, 40])
                kernel = min(kernel, height + 2, width + 2)
                group = r.choice([g for g in (1, 1, 2, 3) if c % g == 0 and out % g == 0])
                slot = m.conv(source, c, out, kernel, padding=1, stride=stride, groups=group)
                shape = (out, *((s + 2 - kernel) // stride + 1 for s in (height, width)))
            elif kind == "depthwise":
                slot, shape = m.conv(source, c, c, 3, padding=1, groups=c), (c, height, width)
            elif kind == "act":
                name = r.choice(["relu", "relu6", "silu", "hardswish"])
                slot, shape = m.plan.activation(source, name), shapes[source]
            elif kind == "norm":
                slot, shape = m.norm(source, c), shapes[source]
            elif kind == "pool":
                pool = r.choice([m.plan.max_pool2d, m.plan.avg_pool2d])
                slot, shape = pool(source, 3, stride=1, padding=1), shapes[source]
            else:
                fits = [s for s, o in shapes.items() if o[1:] == (height, width)]
                if kind == "add":
                    other = r.choice([s for s in fits if shapes[s][0] == c])
                    slot, shape = m.plan.add(source, other), shapes[source]
                else:
                    other = r.choice(fits)
                    slot = m.plan.concat([source, other])
                    shape = (c + shapes[other][0], height, width)
            shapes[slot] = shape

    return StageCase(build, channels, (6, 5), n=r.randint(1, 3), branches=3, k=r.randint(1, 3))
