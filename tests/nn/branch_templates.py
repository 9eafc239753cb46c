"""What the tests of branches share: templates of every kind, and copies to compare with."""

import copy

import torch
from torch import nn

from pyeff.models.hydranet_densenet import DenseLayer
from pyeff.models.hydranet_ressep import SeparableBlock
from pyeff.models.resnet import BlockPlan, PlainBlock
from pyeff.nn import Branches
from pyeff.ops import Routes

CHANNELS, SIZE = 8, 7


def block(kind, preactivation, shortcut, outputs=16, stride=2):
    pad = (outputs // CHANNELS, 0, outputs % CHANNELS)
    plan = BlockPlan(CHANNELS, 8, outputs, stride, 1, shortcut, pad)
    return PlainBlock(plan, kind, preactivation)


class Reshaped(nn.Module):
    """Layers and calls as people write them by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 6, 3, padding="same")
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.SiLU(inplace=True)
        self.fc = nn.Linear(6 * 9, 5)

    def forward(self, x, flag=None):
        y = self.act(self.norm(self.conv(x)))
        y += y
        y = nn.functional.avg_pool2d(y, 2)
        return self.fc(y.view(x.size(0), -1))


class Gated(nn.Module):
    """Squeeze and excitation: products, and calls that no plan holds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.squeeze = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        y = self.conv(x)
        gate = torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return (y * gate).flatten(1)


TEMPLATES = {
    "basic": lambda: block("basic", False, "projection"),
    "basic identity": lambda: block("basic", False, "identity", 8, 1),
    "basic padded": lambda: block("basic", False, "pad"),
    "basic padded unevenly": lambda: block("basic", False, "pad", 12),
    "basic preactivation": lambda: block("basic", True, "pad"),
    "bottleneck": lambda: block("bottleneck", False, "projection"),
    "bottleneck preactivation": lambda: block("bottleneck", True, "projection"),
    "dense": lambda: nn.Sequential(DenseLayer(CHANNELS, 3), DenseLayer(CHANNELS + 3, 3)),
    "separable": lambda: SeparableBlock(CHANNELS, 12, 2, 1),
    "reshaped": Reshaped,
    "conv": lambda: nn.Conv2d(CHANNELS, 6, (3, 1), (2, 1), (1, 0)),
    "grouped": lambda: nn.Conv2d(CHANNELS, 8, 3, groups=4, dilation=2),
    "activations": lambda: nn.Sequential(
        *(nn.ReLU6(), nn.Conv2d(CHANNELS, 6, 1), nn.Hardswish(inplace=True)),
        *(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(6), nn.Dropout(0.0), nn.Conv2d(6, 6, 3), nn.SiLU()),
        *(nn.AvgPool2d(2), nn.Identity(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        *(nn.ReLU(inplace=True),),
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 3, bias=False), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d((2, 1))
    ),
}


def copies_of(branches):
    """A ModuleList of ordinary modules with the weights of ``branches``."""
    copies = nn.ModuleList(branches.template("cpu") for _ in range(branches.branches))
    dtype = next(branches.parameters()).dtype
    copies.to(dtype).load_state_dict(branches.state_dict())
    return copies.train(branches.training)


def branches_of(name, n=5, dtype=torch.float64):
    branches = Branches(TEMPLATES[name](), n).to(dtype)
    for module in branches.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return branches


def some_routes(images, n, k):
    index = torch.stack([torch.randperm(n)[:k] for _ in range(images)]) if images else []
    index = index if images else torch.empty(0, k)
    return Routes(index.to(torch.int32), torch.ones(images, k, dtype=torch.float64))


def one_by_one(copies, x, routes):
    """What ``branches(x, routes)`` has to be in eval mode."""
    rows = [
        torch.stack([copies[b](x[i : i + 1])[0] for b in row])
        for i, row in enumerate(routes.index.tolist())
    ]
    return torch.stack(rows)


def branch_by_branch(copies, x, routes):
    """As :func:`one_by_one` in training mode: every copy sees all of its images at once."""
    n, k = routes.index.shape
    result = {}
    for branch, single in enumerate(copies):
        pairs = (routes.index == branch).nonzero().tolist()
        if pairs:
            images = [i for i, _ in pairs]
            for pair, row in zip(pairs, single(x[images]), strict=True):
                result[tuple(pair)] = row
    return torch.stack([torch.stack([result[i, j] for j in range(k)]) for i in range(n)])


def fresh(module):
    return copy.deepcopy(module)
