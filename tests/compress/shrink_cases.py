"""Networks of every wiring that ``shrink`` follows."""

import torch
import torch.nn.functional as F
from compress.zeroing import randomise_norms
from torch import nn

X = (2, 3, 12, 12)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 7, 1)
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)

    def forward(self, x):
        return self.last(F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


class Gated(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.norm2 = (
            nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False),
            nn.BatchNorm2d(12),
        )
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = F.hardswish(self.norm1(self.expand(x)))
        x = F.hardswish(self.norm2(self.depth(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.project(x * torch.sigmoid(gate))


def chain(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def conv(*args, **options):
    return lambda: nn.Conv2d(*args, **options)


def norm(channels):
    return lambda: nn.BatchNorm2d(channels)


class Shuffled(nn.Module):
    """A unit of ShuffleNet: half of the channels pass by, then all are shuffled."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.b(F.relu(self.a(right)))], 1)
        return self.last(F.relu(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)))


class Inverted(nn.Module):
    """A block of ConvNeXt: linear layers over the last axis of a map, with a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = (
            nn.Conv2d(3, 8, 2, 2),
            nn.Linear(8, 24),
            nn.Linear(24, 8),
        )
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(x.permute(0, 2, 3, 1))))
        return self.last(x + y.permute(0, 3, 1, 2))


NETWORKS = {
    "chain": chain(
        conv(3, 8, 3, padding=1), nn.ReLU, conv(8, 6, 3, padding=1), nn.ReLU, conv(6, 4, 1)
    ),
    "norms": chain(
        conv(3, 8, 3, bias=False), norm(8), nn.SiLU, conv(8, 6, 3), norm(6), conv(6, 4, 1)
    ),
    "flattened": chain(
        conv(3, 6, 3, 2),
        nn.ReLU,
        nn.Flatten,
        lambda: nn.Linear(150, 9),
        nn.ReLU,
        lambda: nn.Linear(9, 4),
    ),
    "transposed": chain(
        lambda: nn.ConvTranspose2d(3, 6, 3, 2, 1, 1),
        nn.ReLU,
        lambda: nn.ConvTranspose2d(6, 5, 2, 2, bias=False),
        norm(5),
        nn.ReLU,
        conv(5, 4, 1),
    ),
    "grouped": chain(conv(3, 12, 1), nn.ReLU, conv(12, 8, 3, groups=4), nn.ReLU, conv(8, 4, 1)),
    "transposed grouped": chain(
        conv(3, 12, 1), nn.ReLU, lambda: nn.ConvTranspose2d(12, 8, 2, 2, groups=4), conv(8, 4, 1)
    ),
    "depthwise": chain(
        conv(3, 8, 1),
        norm(8),
        nn.ReLU6,
        conv(8, 8, 3, 1, 1, groups=8, bias=False),
        norm(8),
        nn.ReLU6,
        conv(8, 4, 1),
    ),
    "prelu": chain(conv(3, 8, 3), lambda: nn.PReLU(8), conv(8, 4, 3)),
    "instance norm": chain(
        conv(3, 8, 3), lambda: nn.InstanceNorm2d(8, affine=True), nn.ReLU, conv(8, 4, 3)
    ),
    "instance norm, in place": chain(
        conv(3, 8, 3),
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.ReLU(inplace=True),
        conv(8, 4, 3),
    ),
    "residual": Residual,
    "concat": Concat,
    "gated": Gated,
    "shuffled": Shuffled,
    "inverted": Inverted,
}


def network(name, double=True):
    model = NETWORKS[name]()
    randomise_norms(model)
    return (model.double() if double else model).eval()


def image(model, shape=X):
    return torch.randn(shape, dtype=next(model.parameters()).dtype)


@torch.no_grad()
def zero(layer, channels, bias=True):
    layer.weight[channels] = 0
    if bias and layer.bias is not None:
        layer.bias[channels] = 0
