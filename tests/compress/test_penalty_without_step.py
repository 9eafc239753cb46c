"""With Adam: layers that no loss reaches, as a head that is not used, are passed over."""

import copy

import pytest
import torch
from torch import nn

from pyeff.compress import GroupSparsity, LowRank

X = torch.randn(2, 3, 8, 8)


class TwoHeads(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.head = nn.Conv2d(32, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(32, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1))
        self.is_aux_used = True

    def forward(self, x):
        x = self.stem(x).relu()
        out = self.head(self.body(x).relu()).mean((2, 3))
        return out + self.aux(x).mean((2, 3)) if self.is_aux_used else out


def penalty(kind, model, **options):
    """Attached to an Adam that has trained the main head for one step."""
    made = GroupSparsity(model, X, **options) if kind == "group" else LowRank(model, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    made.attach(optimizer)
    model.is_aux_used = False
    model(X).square().mean().backward()
    optimizer.step()
    return made


@pytest.mark.parametrize("kind", ["group", "rank"])
@pytest.mark.parametrize("options", [{"strength": 0.1}, {"target_params": 0.5, "schedule": [0.01]}])
def test_a_head_that_is_not_used_is_passed_over(kind, options):
    model = TwoHeads()
    made = penalty(kind, model, **options)
    before = copy.deepcopy(model.state_dict())
    made.end_epoch(0.01)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert "body.weight" in changed
    assert not any(name.startswith("aux") for name in changed)
    found = made.statistics()
    if kind == "group":
        assert found["live"]["aux.0"] == 16
    else:
        assert (found["ranks"]["aux.0"], found["ranks"]["aux.2"]) == (16, 4)
    # The others pay for the head, and no more than that.
    if "target_params" in options:
        assert 0.45 < found["share"] <= 0.5


@pytest.mark.parametrize("kind", ["group", "rank"])
def test_a_target_that_the_rest_cannot_meet_is_told(kind):
    model = TwoHeads(width=512)
    made = penalty(kind, model, target_params=0.2, schedule=[0.01])
    before = copy.deepcopy(model.state_dict())
    message = r"must have taken a step on enough layers to leave \d+ parameters, got \d+ .*aux\.0"
    with pytest.raises(ValueError, match=message):
        made.end_epoch(0.01)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["group", "rank"])
def test_an_optimizer_that_never_stepped_is_told(kind):
    model = TwoHeads()
    options = {"strength": 0.1}
    made = GroupSparsity(model, X, **options) if kind == "group" else LowRank(model, **options)
    made.attach(torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="must have taken a step before the penalty acts, got non"):
        made.end_epoch(0.01)
