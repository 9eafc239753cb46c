"""Small networks with every kind of tie."""

import torch
import torch.nn.functional as F
from torch import nn


class Plain(nn.Module):
    """Convolution, norm, pooling, flatten, linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(10)
        self.hidden = nn.Linear(10 * 4 * 4, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Residual(nn.Module):
    """A sum of three layers' outputs, and a branch of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.inner = nn.Conv2d(10, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 10, 3, padding=1)
        self.side = nn.Conv2d(3, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, image):
        x = F.relu(self.stem(image))
        x = F.relu(x + self.outer(F.relu(self.inner(x))) + self.side(image))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Outputs side by side, one of them also in a sum, with the image first."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 9, 3, padding=1)
        self.right = nn.Conv2d(3, 11, 3, padding=1)
        self.more = nn.Conv2d(20, 11, 3, padding=1)
        self.norm = nn.BatchNorm2d(3 + 20)
        self.head = nn.Conv2d(23, 4, 1)

    def forward(self, image):
        left, right = F.relu(self.left(image)), F.relu(self.right(image))
        right = right + self.more(torch.cat([left, right], 1))
        return self.head(self.norm(torch.cat([image, right, left], 1)))


class Separable(nn.Module):
    """Expansion, depth-wise convolution, squeeze and excitation, depth multiplier."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 9, 1)
        self.excite = nn.Conv2d(9, 12, 1)
        self.project = nn.Conv2d(12, 10, 1)
        self.twice = nn.Conv2d(10, 20, 3, groups=10)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x):
        x = F.relu(self.depth(F.relu(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.twice(F.relu(self.project(x * gate))))


class Grouped(nn.Module):
    """Grouped, transposed and grouped transposed convolutions, and a PReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.scale = nn.PReLU(12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4, bias=False)
        self.head = nn.ConvTranspose2d(8, 3, 1)

    def forward(self, x):
        x = F.relu(self.grouped(self.scale(self.stem(x))))
        return self.head(F.relu(self.up_grouped(F.relu(self.up(x)))))


class Shuffled(nn.Module):
    """Channels change places on their way, which no graph of nodes tells."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.inner = nn.Conv2d(12, 10, 1)
        self.last = nn.Conv2d(10, 20, 1)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        x = self.last(F.relu(self.inner(F.relu(self.depth(x)))))
        first, second = x.chunk(2, 1)
        x = torch.cat([first, F.relu(second)], 1)
        return self.head(x.view(-1, 2, 10, 8, 8).transpose(1, 2).reshape(-1, 20, 8, 8))


class Sequence1d(nn.Module):
    """One-dimensional convolutions with an instance norm, and a linear layer on the last axis."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 10, 3, padding=1)
        self.norm = nn.InstanceNorm1d(10, affine=True)
        self.linear = nn.Linear(10, 9)
        self.head = nn.Linear(9, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.linear(x.transpose(1, 2))))


NETS = {net.__name__: net for net in (Plain, Residual, Concat, Separable, Grouped)}


def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def settled(net):
    """The network with norms that do something, in eval mode."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()
