import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyeff.models import (
    HydraNet,
    build,
    build_backbone,
    hydranet_densenet,
    hydranet_resnet,
    hydranet_resnet50,
    hydranet_ressep,
)
from pyeff.models.hydranet import HydraGate
from pyeff.nn import BranchBatchNorm2d, Branches, Combiner, TopKGate

SMALL = {
    "resnet": lambda **kw: hydranet_resnet(6, n_b=3, widths=(4, 6, 8), **kw),
    "resnet deep": lambda **kw: hydranet_resnet(
        6, n_b=3, widths=(4, 6, 8), d=2, w_b=0.5, shortcut="projection", **kw
    ),
    "resnet preactivation": lambda **kw: hydranet_resnet(
        6, n_b=3, widths=(4, 6, 8), preactivation=True, **kw
    ),
    "densenet": lambda **kw: hydranet_densenet(6, n_b=3, growth=4, d=2, **kw),
    "ressep": lambda **kw: hydranet_ressep(6, n_b=3, d=1, w_s=0.0625, w_b=0.01, w_g=0.01, **kw),
    "resnet50": lambda **kw: hydranet_resnet50(
        6, n_b=3, w_s=0.0625, w_b=0.004, w_g=0.004, d=1, depths=(1, 1, 1), **kw
    ),
}


def randomised(model):
    """Statistics that a mistake would show in, float64, eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | BranchBatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def images(n=3, size=32):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_all_branches_are_the_dense_network(name):
    model = randomised(SMALL[name](k=1))
    x = images()
    with torch.no_grad():
        stem = model.stem(x)
        logits = model.combiner.bias + sum(
            model.branches.copy_of(b)(stem) @ model.combiner.weight[b].T for b in range(3)
        )
        torch.testing.assert_close(model(x, k=3), logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x, k=3).detach(), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_runs_as_one_plan_and_is_rebuilt_from_its_configuration(name):
    model = randomised(SMALL[name](k=2, class_groups=[2, 2, 1, 1, 0, 0]))
    twin = build(json.loads(json.dumps(model.config))).double().eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    x = images(2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model(x).detach(), twin(x).detach())
    assert twin.class_group.tolist() == [2, 2, 1, 1, 0, 0]
    assert twin.k == 2


@pytest.mark.parametrize("gate", ["supervised", "noisy_topk", "learn"])
def test_who_gets_a_gradient_from_what(gate):
    model = SMALL["resnet"](k=2, gate=gate)
    labels = torch.tensor([0, 3, 5, 1])
    out = model.forward_with_gate(torch.randn(4, 3, 16, 16), model.class_group[labels])
    F.cross_entropy(out.logits, labels).backward(retain_graph=True)
    reached = model.gate.top_k.score.weight.grad is not None
    assert reached == (gate != "supervised")
    assert model.stem[0].conv.weight.grad.abs().sum() > 0
    model.zero_grad()
    F.cross_entropy(out.scores, model.class_group[labels]).backward(retain_graph=True)
    assert model.gate.top_k.score.weight.grad.abs().sum() > 0
    assert model.branches.stack.get_submodule("0").conv1.weight.grad is None
    assert out.auxiliary.shape == ()
    assert (out.auxiliary.item() > 0) == (gate == "noisy_topk")


def test_teacher_forcing_and_shapes():
    model = SMALL["resnet"](k=2)
    labels = torch.tensor([0, 3, 5, 1])
    out = model.forward_with_gate(torch.randn(4, 3, 16, 16), model.class_group[labels], k=2)
    assert torch.equal(out.routes.index[:, 0].long(), model.class_group[labels])
    assert (out.routes.index[:, 0] != out.routes.index[:, 1]).all()
    assert out.logits.shape == (4, 6)
    assert out.scores.shape == (4, 3)


def test_a_few_steps_learn():
    torch.manual_seed(1)
    model = SMALL["resnet"](k=2)
    x, labels = torch.randn(24, 3, 16, 16), torch.arange(24) % 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        out = model.forward_with_gate(x)
        loss = F.cross_entropy(out.logits, labels)
        loss = loss + F.cross_entropy(out.scores, model.class_group[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_costs_of_hydra_res_agree_with_the_papers_plot():
    expected = {1: 52.4, 9: 580.9}
    for d, macs in expected.items():
        cost = hydranet_resnet(100, n_b=20, k=12, w_g=0.5, d=d).costs()
        assert round(cost.macs / 1e6, 1) == macs
    cost = hydranet_resnet(100, n_b=20, k=12, w_g=0.5, d=1).costs()
    assert round(cost.params / 1e6, 2) == 1.28
    step = [hydranet_resnet(100, n_b=20, k=12, d=d).costs().macs for d in (1, 2, 3)]
    assert round((step[2] - step[1]) / 1e6, 1) == round((step[1] - step[0]) / 1e6, 1) == 66.1


def test_costs_of_ressep_agree_with_the_papers_widths():
    with torch.device("meta"):
        model = hydranet_ressep()
    assert [round(model.costs(k=k).macs / 1e6) for k in (2, 4, 8)] == [221, 234, 258]
    assert round(model.costs().conv_fc_params / 1e6, 1) == 13.0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("gate", ["supervised", "noisy_topk"])
def test_costs_count_every_parameter(name, gate):
    model = SMALL[name](k=2, gate=gate)
    cost = model.costs(32)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.conv_fc_params < cost.params
    parts = cost.stem.macs + cost.gate.macs
    assert cost.macs == parts + 2 * (cost.branch.macs + cost.combiner.macs)
    assert model.costs(32, k=3).macs - cost.macs == cost.branch.macs + cost.combiner.macs
    assert model.costs((64, 32)).stem.macs == 2 * cost.stem.macs


def test_static_network_of_the_same_blocks():
    """What Hydra-Res is compared with: its blocks, one stage 3."""
    static = build_backbone("resnet8", 100, preactivation=False)
    assert build(static.config).config == static.config
    hydra = hydranet_resnet(100, n_b=1, k=1)
    gate = sum(p.numel() for p in hydra.gate.parameters())
    count = sum(p.numel() for p in hydra.parameters()) - gate
    assert sum(p.numel() for p in static.parameters()) == count
    blocks = nn.ModuleList(static.blocks)
    hydra.stem[0].load_state_dict(static.stem.state_dict())
    hydra.stem[1].load_state_dict(blocks[0].state_dict())
    hydra.stem[2].load_state_dict(blocks[1].state_dict())
    state = {f"0.0.{key}": value for key, value in blocks[2].state_dict().items()}
    hydra.branches.load_state_dict(state)
    with torch.no_grad():
        hydra.combiner.weight.copy_(static.head.weight[None])
        hydra.combiner.bias.copy_(static.head.bias)
        x = images(2)
        static, hydra = static.double().eval(), hydra.double().eval()
        torch.testing.assert_close(hydra(x), static(x), rtol=1e-10, atol=1e-10)


def test_k_changes_at_run_time():
    model = randomised(SMALL["resnet"](k=2))
    x = images()
    one, two = model(x, k=1), model(x)
    model.k = 1
    torch.testing.assert_close(model(x), one)
    assert not torch.allclose(one, two)
    assert model.forward_with_gate(x).routes.index.shape == (3, 1)


def test_class_groups_are_balanced_in_order_by_default():
    assert SMALL["resnet"](k=1).class_group.tolist() == [0, 0, 1, 1, 2, 2]
    assert hydranet_resnet(100, n_b=20).class_group.bincount().tolist() == [5] * 20


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    model = SMALL["resnet"](k=2).train(training)
    with torch.set_grad_enabled(training):
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 6)


def test_nan_is_refused():
    model = SMALL["resnet"](k=2).eval()
    with pytest.raises(ValueError, match="scores must hold no NaN"):
        model(torch.full((1, 3, 32, 32), float("nan")))


def test_state_dict_holds_ordinary_copies_and_the_partition():
    model = SMALL["resnet"](k=2)
    keys = list(model.state_dict())
    assert "branches.2.0.conv1.weight" in keys
    assert "class_group" in keys
    other = SMALL["resnet"](k=2, class_groups=[0, 1, 2, 0, 1, 2])
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.class_group, model.class_group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be in 1\.\.3, got 0"),
        ({"k": 4}, r"k must be in 1\.\.3, got 4"),
        ({"k": 1, "gate": "best"}, "mode must be one of"),
        ({"k": 1, "class_groups": [0, 1]}, "class_groups must be one for each of 6 classes, got 2"),
        ({"k": 1, "class_groups": [0, 1, 2, 3, 0, 1]}, r"class_groups must be in 0\.\.2, got 0 to"),
        ({"k": 1, "d": 0}, "d must be positive, got 0"),
        ({"k": 1, "w_b": -1.0}, r"w_b must be positive, got -1\.0"),
        ({"k": 1, "shortcut": "none"}, "shortcut must be 'pad' or 'projection', got 'none'"),
    ],
)
def test_errors_of_the_family(options, message):
    with pytest.raises(ValueError, match=message):
        SMALL["resnet"](**options)


def test_errors_of_the_other_families():
    with pytest.raises(ValueError, match="hydranet_resnet: widths must be 3 positive ints"):
        hydranet_resnet(6, n_b=3, k=1, widths=(4, 8))
    with pytest.raises(ValueError, match="hydranet_resnet50: depths must be 3 positive ints"):
        hydranet_resnet50(6, n_b=3, k=1, depths=(1, 0, 1))
    with pytest.raises(ValueError, match="hydranet_densenet: growth must be positive, got 0"):
        hydranet_densenet(6, n_b=3, k=1, growth=0)
    with pytest.raises(ValueError, match="hydranet_ressep: d must be positive, got 0"):
        hydranet_ressep(6, n_b=3, k=1, d=0)


def test_errors_of_the_model():
    model = SMALL["resnet"](k=2)
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3, got 4"):
        model(torch.randn(1, 3, 32, 32), k=4)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3, got 0"):
        model.k = 0
    with pytest.raises(TypeError, match="k must be an int, got float"):
        model.k = 2.0
    with pytest.raises(ValueError, match="input_size must be positive, got 0"):
        model.costs(0)
    with pytest.raises(ValueError, match="must have as many branches, got 2, 3 and 3"):
        HydraNet(
            nn.Identity(),
            HydraGate(nn.Flatten(), TopKGate(4, 2)),
            Branches(nn.Conv2d(2, 2, 1), 3),
            Combiner(2, 2, 3),
        )
