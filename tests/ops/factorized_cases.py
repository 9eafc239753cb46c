"""Pairs of 1-D convolutions that every backend has to solve."""

import random
from dataclasses import dataclass

import torch

EPILOGUE = ("scale", "shift", "residual")
NAMES = ("x", "w_first", "b_first", "w_second", "b_second", *EPILOGUE)
HALVES = (torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")


@dataclass(frozen=True)
class Case:
    """A pair, what surrounds it, and the size of its input."""

    n: int = 2
    channels: int = 5
    middle: int = 6
    outputs: int = 7
    size: tuple[int, int] = (6, 8)
    taps: int = 3
    vertical_first: bool = True
    stride: int = 1
    padding: int | str = "same"
    dilation: int = 1
    inner: str | None = "relu"
    outer: str | None = None
    given: tuple[str, ...] = ("b_first", "b_second")  # of the optional tensors

    def options(self):
        """The keyword arguments that are no tensors."""
        names = ("stride", "padding", "dilation", "inner", "outer")
        return {name: getattr(self, name) for name in names}

    def weight_shapes(self):
        along, across = (self.taps, 1), (1, self.taps)
        first, second = (along, across) if self.vertical_first else (across, along)
        return (self.middle, self.channels, *first), (self.outputs, self.middle, *second)

    def output_size(self):
        padding = {"same": self.dilation * (self.taps // 2), "valid": 0}.get(
            self.padding, self.padding
        )
        reach = self.dilation * (self.taps - 1) + 1
        return tuple((s + 2 * padding - reach) // self.stride + 1 for s in self.size)

    def tensors(self, dtype, device="cpu"):
        """All eight tensors by name, None where not given, with outputs of about unit size."""
        first, second = self.weight_shapes()
        shapes = {
            "x": (self.n, self.channels, *self.size),
            "w_first": first,
            "b_first": first[:1],
            "w_second": second,
            "b_second": second[:1],
            "scale": second[:1],
            "shift": second[:1],
            "residual": (self.n, self.outputs, *self.output_size()),
        }
        tensors = dict.fromkeys(NAMES)
        for name in ("x", "w_first", "w_second", *self.given):
            tensors[name] = self.values(shapes[name], dtype, device)
        for name in ("w_first", "w_second"):
            weight, terms = tensors[name], shapes[name][1] * self.taps
            if dtype in HALVES:
                tensors[name] = weight.sign() * (torch.rand(weight.shape) < 4 / terms).to(weight)
            else:
                weight /= terms**0.5
        return tensors

    @staticmethod
    def values(shape, dtype, device="cpu"):
        """Numbers of about unit size.

        In half precision small whole ones, and few of the weights are not zero: what convolutions
        and sums make of them is exact, so that no value falls on the other side of an activation's
        kink than in float64.
        """
        if dtype in HALVES:
            return torch.randint(-2, 3, shape, device=device).to(dtype)
        return torch.randn(shape, device=device, dtype=dtype)


ALL = ("b_first", "b_second", *EPILOGUE)
CASES = {
    "small, no two dimensions equal": Case(),
    "horizontal first": Case(vertical_first=False),
    "all ones": Case(1, 1, 1, 1, (1, 1), 1),
    "one pixel": Case(2, 3, 4, 5, (1, 1)),
    "everything": Case(outer="relu", given=ALL),
    "everything, horizontal first": Case(outer="relu", given=ALL, vertical_first=False),
    "nothing": Case(inner=None, given=()),
    "erfnet, 16 channels": Case(1, 16, 16, 16, (9, 21), outer="relu", given=ALL),
    "erfnet, 64 channels": Case(1, 64, 64, 64, (5, 18), outer="relu", given=ALL),
    "dilated": Case(1, 32, 32, 32, (13, 17), dilation=4, outer="relu", given=ALL),
    "dilated, horizontal first": Case(1, 12, 20, 9, (13, 17), dilation=3, vertical_first=False),
    "dilation beyond the image": Case(2, 8, 8, 8, (5, 6), dilation=16),
    "stride 2": Case(2, 9, 10, 11, (9, 8), stride=2, given=ALL),
    "stride 2, horizontal first": Case(2, 9, 10, 11, (9, 8), stride=2, vertical_first=False),
    "stride 3, dilation 2": Case(1, 4, 5, 6, (13, 11), stride=3, dilation=2, given=ALL),
    "stride 2, dilation 2": Case(1, 4, 5, 6, (13, 12), stride=2, dilation=2, taps=5),
    "5 taps": Case(2, 6, 9, 4, (7, 9), 5, given=ALL, outer="relu6"),
    "7 taps, 3 channels": Case(1, 3, 33, 20, (12, 11), 7, vertical_first=False),
    "1 tap": Case(2, 6, 9, 4, (4, 5), 1, given=ALL),
    "1 tap, stride 2": Case(2, 6, 9, 4, (4, 5), 1, stride=2),
    "valid": Case(2, 5, 6, 7, (6, 8), padding="valid"),
    "valid, horizontal first": Case(2, 5, 6, 7, (6, 8), padding="valid", vertical_first=False),
    "padding above the kernel": Case(2, 5, 6, 7, (3, 4), padding=4, given=ALL),
    "silu twice": Case(inner="silu", outer="silu", given=ALL),
    "hardswish and silu": Case(inner="hardswish", outer="silu", given=ALL),
    "relu6 and hardswish": Case(inner="relu6", outer="hardswish", given=ALL),
    "more outputs than a panel, odd tail": Case(1, 35, 50, 70, (6, 5)),
    "wide rows": Case(1, 6, 17, 33, (3, 47)),
    "empty batch": Case(0, 5, 6, 7, given=ALL, outer="relu"),
}


def random_case(seed: int) -> Case:
    """Any legal pair of small size."""
    r = random.Random(seed)
    taps, dilation = r.choice([1, 3, 3, 3, 5, 7]), r.choice([1, 1, 2, 3, 5])
    padding = r.choice(["same", "same", "valid", r.randint(0, 5)])
    reach = dilation * (taps - 1)
    known = {"same": reach, "valid": 0}.get(padding)
    least = max(1, 1 + reach - (2 * padding if known is None else known))
    inner = r.choice(ACTIVATIONS)
    # After a rounded activation a value in half precision may fall on the other side of a kink.
    outer = r.choice([None, "silu"] if inner in ("silu", "hardswish") else ACTIVATIONS)
    return Case(
        n=r.choice([0, 1, 1, 2, 3]),
        channels=r.choice([r.randint(1, 9), r.randint(1, 40)]),
        middle=r.choice([r.randint(1, 9), r.randint(1, 40)]),
        outputs=r.choice([r.randint(1, 9), r.randint(1, 40)]),
        size=(least + r.randint(0, 11), least + r.randint(0, 15)),
        taps=taps,
        vertical_first=r.random() < 0.5,
        stride=r.choice([1, 1, 1, 2, 3]),
        padding=padding,
        dilation=dilation,
        inner=inner,
        outer=outer,
        given=tuple(name for name in ALL if r.random() < 0.5),
    )
