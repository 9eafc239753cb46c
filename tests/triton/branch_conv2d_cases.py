"""Small branch layers on which every way of running the Triton kernels meets the reference."""

from dataclasses import dataclass

import torch

from pyeff.reference.branch_conv2d import branch_conv2d as reference

# One image takes the same branch twice; nobody takes branch 1.
TWICE = ((2, 0), (2, 2))
WANTED = ("x", "weight", "bias")


@dataclass(frozen=True)
class BranchCase:
    """One stack of layers and one routing; the defaults are a small 2x3."""

    name: str
    inputs: int = 5
    outputs: int = 6
    image: tuple[int, int] = (4, 5)
    kernel: tuple[int, int] = (2, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shared: bool = True  # one x for all branches of an image
    branches: int = 3
    routes: tuple[tuple[int, ...], ...] | tuple[int, int] = TWICE  # or (N, k): at random

    def __str__(self):
        return self.name.replace(" ", "-")

    def index(self, device="cpu"):
        if isinstance(self.routes[0], tuple):
            return torch.tensor(self.routes, dtype=torch.int32, device=device)
        n, k = self.routes
        scores = torch.rand(n, self.branches)
        # The second half of the branches is rarely taken: their lists differ in length.
        scores[:, self.branches // 2 :] /= 2
        return scores.topk(k, dim=1).indices.to(device, torch.int32)

    def tensors(self, dtype, device="cpu"):
        """x, weight, bias and the index, of a size that keeps the results near one."""
        index = self.index(device)
        outer = index.shape[:1] if self.shared else index.shape
        x = torch.randn(*outer, self.inputs, *self.image)
        shape = (self.branches, self.outputs, self.inputs // self.groups, *self.kernel)
        weight = torch.randn(shape)
        weight /= max(1, weight[0, 0].numel()) ** 0.5
        bias = torch.randn(self.branches, self.outputs)
        return (*(t.to(device, dtype) for t in (x, weight, bias)), index)

    def window(self):
        return self.stride, self.padding, self.dilation, self.groups

    def reference(self, x, weight, bias, index):
        """The result in float64."""
        x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
        stride, padding, dilation, groups = self.window()
        return reference(
            x,
            weight,
            bias,
            index,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    def reference_gradients(self, grad_y, x, weight, bias, index):
        """Gradients of x, weight and bias in float64."""
        leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(self.reference(*leaves, index), leaves, grad_y.double())


SHARED = BranchCase("one x for all branches")
PER_PAIR = BranchCase("one x for each pair", shared=False, stride=(2, 1), padding=(0, 1, 2, 1))
GROUPS = BranchCase("groups", 4, 6, groups=2, dilation=(1, 2))
DEPTHWISE = BranchCase("depth-wise", 6, 6, groups=6, stride=(2, 1), dilation=(1, 2))
CASES = [
    SHARED,
    PER_PAIR,
    GROUPS,
    DEPTHWISE,
    BranchCase("groups for each pair", 4, 6, groups=2, shared=False, kernel=(2, 1)),
    BranchCase("depth-wise for each pair", 4, 8, groups=4, shared=False, kernel=(1, 3)),
    BranchCase("all ones", 1, 1, (1, 1), (1, 1), padding=(0, 0, 0, 0), branches=1, routes=((0,),)),
    BranchCase("one pixel, a linear layer", 7, 9, (1, 1), (1, 1), padding=(0, 0, 0, 0)),
    BranchCase("stride above the kernel", 4, 3, (7, 6), (2, 1), stride=(3, 4)),
    # The common divisor of stride and dilation leaves pixels that no tap reaches.
    BranchCase("stride 4, dilation 2", 4, 5, (9, 8), (2, 3), (4, 2), dilation=(2, 2)),
    # More classes of pixels than there are pixels; their number would not fit into 32 bits.
    BranchCase("stride above the image", 4, 3, (3, 2), (2, 1), (60000, 50000), (1, 1, 0, 1)),
    BranchCase("more channels than a block", 70, 66, (2, 3), (1, 1), padding=(0, 0, 0, 0)),
]
