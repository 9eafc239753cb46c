"""``shrink`` on networks whose inputs, outputs or weights are not those of a plain classifier."""

import copy

import pytest
import torch
from torch import nn

from pyeff.compress import shrink
from pyeff.compress.shrink import shrink_with_report


class Words(nn.Module):
    def __init__(self, hidden=257):
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.first = nn.Linear(64, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 5)

    def forward(self, words):
        x = torch.tanh(self.first(self.table(words).mean(1)))
        return self.last(torch.relu(self.second(x)))


def test_inputs_may_be_whole_numbers_alone():
    model = Words()
    with torch.no_grad():
        for layer in (model.first, model.second):
            dead = torch.randperm(257)[:128]
            layer.weight[dead] = 0
            layer.bias[dead] = 0
    words = torch.randint(50, (2, 5))
    small, report = shrink_with_report(model, words)
    assert (small.first.out_features, small.second.out_features) == (129, 129)
    assert not report.kept
    torch.testing.assert_close(small(words), model(words))


class SharedReaders(nn.Module):
    """Two ways whose second convolutions have one weight."""

    def __init__(self, holder="conv"):
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.readers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))
        if holder == "conv":
            self.readers[1].weight = self.readers[0].weight
        else:
            # Read by its rows beside the layers, as by a loss.
            self.table = nn.Embedding(8, 8)
            self.table.weight = self.mixer().weight

    def mixer(self):
        self.mix = nn.Linear(8, 8)
        return self.mix

    def forward(self, x):
        found = []
        parts = zip(self.stems, self.norms, self.readers, self.heads, strict=True)
        for stem, norm, reader, head in parts:
            y = reader(torch.relu(norm(stem(x))))
            if hasattr(self, "mix"):
                y = self.mix(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            found.append(head(torch.relu(y)))
        return tuple(found)


def test_channels_of_readers_that_share_a_weight_stay():
    model, x = SharedReaders().eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        model.norms[0].bias.fill_(1.0)
        model.stems[0].weight[:4] = 0
    wanted = model(x)
    small, report = shrink_with_report(model, x)
    assert small.readers[0].weight is small.readers[1].weight
    assert report.parameters[0] == report.parameters[1]
    for found, right in zip(small(x), wanted, strict=True):
        torch.testing.assert_close(found, right)
    assert "readers.0, which reads it: it shares its weight with readers.1" in (
        report.left_out.values()
    )


def test_a_weight_that_a_table_has_too_is_not_cut():
    model, x = SharedReaders("table").eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for reader in model.readers:
            reader.weight[:3] = 0
            reader.bias[:3] = 0
    small = shrink(model, x)
    assert small.mix.weight is small.table.weight
    assert small.mix.weight.shape == (8, 8)


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_normed_layers_stand_beside_what_is_removed(norm):
    model = nn.Sequential(
        *(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        nn.Conv2d(8, 2, 3),
    )
    with torch.no_grad():
        model[2].weight[:3] = 0
        model[2].bias[:3] = 0
    x = torch.randn(1, 3, 16, 16)
    small = shrink(model, x)
    assert small[2].out_channels == 5
    torch.testing.assert_close(small(x), model(x))


class Outputs(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.give = give

    def forward(self, x):
        return self.give(self.body(x))


OUTPUTS = {
    "nothing beside": lambda y: (y, None),
    "a dict": lambda y: {"out": y, "aux": None, "classes": 4},
    "classes": lambda y: (y.argmax(1), y),
    "a size": lambda y: (y, tuple(y.shape[2:])),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_be_more_than_what_autograd_records(name):
    model, x = Outputs(OUTPUTS[name]), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model.body[0].weight[:3] = 0
        model.body[0].bias[:3] = 0
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, x)
    assert small.body[0].out_channels == 5
    assert small.body[2].out_channels == 4
    torch.testing.assert_close(small(x), model(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_outputs_without_a_graph_are_refused():
    model = Outputs(lambda y: (y.argmax(1), None))
    with pytest.raises(ValueError, match="must give tensors that autograd recorded"):
        shrink(model, torch.randn(1, 3, 9, 9))
