import pytest
import torch
from torch import nn

from pyeff.nn import Branches


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"norm": nn.GroupNorm(2, 8)})

    def forward(self, x):
        return self.inner["norm"](x)


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


class Mixing(nn.Module):
    """Mixes the images of a batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x).mean(0)


class Sorting(Mixing):
    def forward(self, x):
        return torch.sort(self.conv(x)).values


class Aliasing(Mixing):
    def forward(self, x):
        y = self.conv(x)
        nn.functional.relu(y, inplace=True)
        return y


class Pair(Mixing):
    def forward(self, x):
        return self.conv(x), x


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Recurrent, "got GroupNorm at 'inner.norm'"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Softmax(1)), "got Softmax at '1'"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 1)), "got ConvTranspose2d at '0'"),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
            "got Conv2d at '0'",
        ),
        (lambda: nn.LSTM(8, 8), "got LSTM at the template itself"),
        (Owner, "got Owner at the template itself"),
        (Mixing, "got a call of mean at the template itself"),
        (lambda: nn.Sequential(nn.ReLU(), Sorting()), "got a call of sort at '1'"),
        (Aliasing, "in-place call whose input is used again"),
        (Pair, "got an output of tuple"),
        (Shared, "got Conv2d sharing its parameters at 'second'"),
    ],
)
def test_unsupported_templates_are_named(template, message):
    with pytest.raises(TypeError, match=message):
        Branches(template(), 2)
