"""Small layers on which every way of running the Triton kernels is compared with the reference."""

from dataclasses import dataclass

import torch

from pyeff.reference.nested_conv2d import nested_conv2d as reference


@dataclass(frozen=True)
class Case:
    """One layer and one selection; the defaults are a 3x3 layer with one pixel of padding."""

    name: str
    inputs: int  # of the full layer
    outputs: int
    in_sel: tuple[int, ...]  # (lo, hi), or channel numbers with by_index
    out_sel: tuple[int, ...]
    image: tuple[int, int] = (7, 9)
    batch: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    by_index: bool = False

    def __str__(self):
        return self.name.replace(" ", "-")

    def selections(self, device="cpu"):
        if self.by_index:
            return tuple(torch.tensor(s, device=device) for s in (self.in_sel, self.out_sel))
        return self.in_sel, self.out_sel

    def tensors(self, dtype, device="cpu"):
        """x, weight and bias, of a size that keeps the results near one."""
        count = len(self.in_sel) if self.by_index else self.in_sel[1] - self.in_sel[0]
        x = torch.randn(self.batch, count, *self.image)
        weight = torch.randn(self.outputs, self.inputs // self.groups, *self.kernel)
        weight /= max(1, weight[0].numel()) ** 0.5
        bias = torch.randn(self.outputs)
        return tuple(t.to(device, dtype) for t in (x, weight, bias))

    def window(self):
        return self.stride, self.padding, self.dilation, self.groups

    def reference(self, x, weight, bias):
        in_sel, out_sel = self.selections(x.device)
        suffix = "index" if self.by_index else "range"
        return reference(
            x,
            weight,
            bias,
            **{f"in_{suffix}": in_sel, f"out_{suffix}": out_sel},
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def reference_gradients(self, grad_y, x, weight):
        """Gradients of x and weight in float64."""
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        return torch.autograd.grad(self.reference(x, weight, None), (x, weight), grad_y.double())


RANGE = Case("range in the middle", 16, 14, (4, 13), (2, 11))
INDEX = Case(
    "index, unordered", 12, 16, (7, 3, 8), (0, 9, 15, 4, 2), by_index=True, padding=(1, 0, 2, 1)
)
GROUPS = Case("whole groups in the middle", 12, 18, (4, 8), (6, 12), groups=6, stride=(2, 2))
DEPTHWISE = Case("depth-wise", 8, 8, (2, 7), (2, 7), groups=8, stride=(2, 1), dilation=(1, 2))
CASES = [
    RANGE,
    INDEX,
    GROUPS,
    DEPTHWISE,
    Case("all ones", 1, 1, (0, 1), (0, 1), (1, 1), 1, (1, 1), padding=(0, 0, 0, 0)),
    Case("1x1, the full layer", 5, 6, (0, 5), (0, 6), kernel=(1, 1), padding=(0, 0, 0, 0)),
    Case("1x1 with stride", 8, 8, (3, 7), (1, 8), kernel=(1, 1), stride=(2, 3), image=(8, 7)),
    Case("stride 2, even image", 8, 8, (0, 4), (0, 6), (8, 6), stride=(2, 2)),
    Case("stride above the kernel", 4, 4, (1, 3), (0, 4), (9, 8), kernel=(2, 1), stride=(3, 4)),
    Case("dilation, uneven padding", 6, 7, (2, 6), (1, 6), padding=(3, 0, 1, 4), dilation=(2, 3)),
    # The common divisor of stride and dilation leaves pixels that no tap reaches.
    Case("stride 4, dilation 2", 4, 5, (0, 3), (1, 4), (11, 10), stride=(4, 2), dilation=(2, 2)),
    # More classes of pixels than there are pixels; their number would not fit into 32 bits.
    Case("stride above the image", 4, 4, (1, 3), (0, 4), (3, 2), stride=(60000, 50000)),
    Case(
        "5x2 kernel on one row", 4, 4, (0, 4), (2, 4), (1, 9), kernel=(5, 2), padding=(2, 2, 0, 1)
    ),
    Case("two outputs per depth-wise group", 6, 12, (2, 5), (4, 10), groups=6),
    Case("more channels than a block", 70, 66, (0, 69), (1, 66), (3, 4), 1),
]
