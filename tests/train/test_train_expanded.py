"""Training of expanded networks: both forms, decay on the product, +Init, the best epoch."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from train.tiny import tiny_config
from train.together import run

import pyeff
from pyeff.models import smallnet
from pyeff.nn import ExpandedConv2d, ExpandedLinear
from pyeff.train import Trainer, load_tasks
from pyeff.train.network import build_network
from pyeff.train.optimizer import add_product_decay, build_optimizer
from pyeff.train.report import best_epochs, train_and_report

MODEL = {"family": "smallnet", "expand": "ck", "rate": 2}


def config(out, **changes):
    model = {**MODEL, **changes.pop("model", {})}
    settings = {"tasks": ("digits:class",), "model": model, "epochs": 1, "lr": 0.05}
    return tiny_config(out, **{**settings, **changes})


def trained(out, **changes):
    return Trainer(config(out, **changes)).fit().model


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_both_forms_train_alike(tmp_path):
    found = [
        weights(trained(tmp_path / form, precision="fp64", model={"form": form, "expand": "ck+fc"}))
        for form in ("expanded", "contracted")
    ]
    start = weights(smallnet(expand="ck+fc", rate=2, in_channels=1, image_size=8))
    assert found[0].shape == start.shape
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def chains():
    made = nn.Sequential(
        ExpandedConv2d(3, 6, 5, groups=3, rate=2),
        nn.Flatten(),
        ExpandedLinear(6, 4, rate=2),
        nn.Linear(4, 2),
    )
    return made.double()


def test_decay_of_the_product_is_the_gradient_of_the_contracted_weights_squares():
    model = chains()
    direction = [torch.randn_like(p) for p in model.parameters()]

    def penalty(step):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
            plain = [model[i].contract().weight.detach() for i in (0, 2)]
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= step * d
        return 0.5 * 0.3 * sum(float(w.square().sum()) for w in plain)

    before = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g.clone()
    add_product_decay(model, 0.3)
    added = [p.grad - g for p, g in zip(model.parameters(), before, strict=True)]
    slope = sum(float((a * d).sum()) for a, d in zip(added, direction, strict=True))
    assert slope == pytest.approx((penalty(1e-5) - penalty(-1e-5)) / 2e-5, rel=1e-6)
    # Neither biases nor the plain layer.
    names = [n for n, _ in model.named_parameters()]
    untouched = {n for n, a in zip(names, added, strict=True) if not a.any()}
    assert untouched == {n for n in names if n.endswith("bias")} | {"3.weight"}


def test_decay_of_the_product_starts_gradients_and_may_be_nothing():
    model = chains()
    add_product_decay(model, 0.0)
    add_product_decay(nn.Linear(3, 2), 0.1)
    assert all(p.grad is None for p in model.parameters())
    add_product_decay(model, 0.1)
    assert model[0].members[0].weight.grad.any()
    assert model[0].members[0].bias.grad is None


def test_decay_of_the_product_leaves_frozen_chains_alone():
    model = chains()
    model[0].requires_grad_(False)
    model[2].members[1].weight.requires_grad_(False)
    add_product_decay(model, 0.1)
    assert all(member.weight.grad is None for member in model[0].members)
    assert [member.weight.grad is None for member in model[2].members] == [False, True, False]
    model.requires_grad_(False)
    add_product_decay(model, 0.1)


def test_what_the_optimiser_decays():
    model = chains()
    names = {p: n for n, p in model.named_parameters()}

    def decayed(**options):
        built = build_optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.1, **options)
        return {names[p] for g in built.param_groups if g["weight_decay"] for p in g["params"]}

    assert decayed(factors=False) == {"3.weight"}
    assert decayed() == {n for n in names.values() if n.endswith("weight")}


def test_plain_momentum():
    steps = {}
    for nesterov in (True, False):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        made = build_optimizer(layer, lr=0.1, momentum=0.5, weight_decay=0.0, nesterov=nesterov)
        layer.weight.grad = torch.ones(1, 1)
        made.step()
        steps[nesterov] = round(1 - layer.weight.detach().item(), 6)
    assert steps == {True: 0.15, False: 0.1}


def test_decay_on_the_product_trains_another_network(tmp_path):
    found = {}
    for on in ("factors", "product"):
        for decay in (0.0, 0.1):
            out = tmp_path / f"{on}{decay}"
            found[on, decay] = trained(out, weight_decay_on=on, weight_decay=decay)
    assert torch.equal(weights(found["factors", 0.0]), weights(found["product", 0.0]))

    def norm(key):
        model = found[key]
        return sum(getattr(model, f"conv{n}").product_norm().item() for n in (1, 2, 3))

    assert norm(("product", 0.1)) < norm(("product", 0.0))
    assert norm(("product", 0.1)) != norm(("factors", 0.1))


def test_init_from_starts_with_the_weights_of_another_run(tmp_path):
    relu = trained(tmp_path / "relu", model={"activation": "relu"})
    assert relu.conv1.activation == "relu"
    # Steps that are too small to move anything.
    still = {"lr": 1e-30, "weight_decay": 0.0, "schedule": "constant"}
    model = trained(tmp_path / "linear", init_from=str(tmp_path / "relu"), **still)
    assert model.conv1.activation is None
    assert torch.equal(weights(model), weights(relu))
    fresh = trained(tmp_path / "fresh", **still)
    assert not torch.allclose(weights(model), weights(fresh))
    # A resumed run does not ask for it again.
    (tmp_path / "relu" / "checkpoint.safetensors").unlink()
    again = Trainer(config(tmp_path / "linear", init_from=str(tmp_path / "relu"), **still))
    assert torch.equal(weights(again.fit(resume=True).model), weights(relu))


def test_init_from_another_network_is_refused(tmp_path):
    trained(tmp_path / "ck")
    other = config(tmp_path / "cl", model={"expand": "cl"}, init_from=str(tmp_path / "ck"))
    with pytest.raises(ValueError, match=r"ck must hold the tensors of this model, got: "):
        Trainer(other).fit()
    missing = config(tmp_path / "b", init_from=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="path must name a checkpoint file"):
        Trainer(missing).fit()


def test_results_have_the_last_and_the_best_epoch(tmp_path, capsys):
    result = train_and_report(config(tmp_path, epochs=3))
    document = json.loads((tmp_path / "results.json").read_text())
    (line,), (best,) = document["results"], document["best_epochs"]
    seen = [record["test_accuracy"] for record in result.records]
    assert len(seen) == 3
    assert line["accuracy"] == seen[-1]
    assert best["accuracy"] == max(seen)
    assert best["epoch"] == seen.index(max(seen)) + 1
    assert (
        f"best epoch by the test images, digits:class: {best['epoch']}" in capsys.readouterr().out
    )
    # What is told of its cost is that of the plain network.
    plain = smallnet(10, in_channels=1, image_size=8)
    assert line["params"] == sum(p.numel() for p in plain.parameters())
    assert line["macs"] == plain.costs().macs > 0
    loaded = pyeff.load(tmp_path)
    assert torch.equal(weights(loaded), weights(result.model))


def test_best_epochs_takes_the_first_of_equal_ones():
    def record(epoch, accuracy, task="a"):
        return {"epoch": epoch, "task": task, "level": 1, "test_accuracy": accuracy}

    records = [
        record(1, 0.5),
        record(2, None),
        record(3, 0.75),
        record(4, 0.75),
        record(4, 0.1, "b"),
    ]
    assert best_epochs(records) == [
        {"task": "a", "level": 1, "epoch": 3, "accuracy": 0.75},
        {"task": "b", "level": 1, "epoch": 4, "accuracy": 0.1},
    ]


def test_two_processes_compute_what_one_does_with_the_joint_batch(tmp_path):
    script = "expanded_distributed_run.py"
    alone, _ = run(script, tmp_path / "one", processes=1)
    together, _ = run(script, tmp_path / "two", processes=2)
    assert any(".members." in name for name in alone)
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(together[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "expand"),
    [("mobilenet_v1", "cl"), ("mobilenet_v2", "cl"), ("shufflenet_v2_x0_5", "cl")],
)
def test_other_networks_with_a_plan_train(family, expand, tmp_path):
    model = {"family": family, "expand": expand, "rate": 1}
    if family != "shufflenet_v2_x0_5":
        model["width"] = 0.25
    settings = {"tasks": ("digits:class",), "model": model, "epochs": 1, "limit_train": 32}
    result = Trainer(tiny_config(tmp_path, **settings)).fit()
    assert isinstance(result.model, pyeff.models.ExpandableNet)
    assert result.model.config["in_channels"] == 1
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["test_accuracy"] == result.accuracy["digits:class", 1]
    assert pyeff.load(tmp_path).config["expand"] == "cl"


def test_the_images_decide_the_size():
    (task,) = load_tasks(["digits:class"], limit_train=8, limit_test=8)
    model = build_network({"family": "smallnet"}, [task])
    assert (model.image_size, model.in_channels, model.classes) == (8, 1, 10)
    oblong = replace(task, train_images=task.train_images[:, :, :7])
    with pytest.raises(ValueError, match="smallnet must have square images, got 8 x 7"):
        build_network({"family": "smallnet"}, [oblong])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"expand": None}, "weight_decay_on": "product"},
            "weight_decay_on must be factors for a network without linear chains, got 'product'",
        ),
        (
            {"model": {"activation": "relu"}, "weight_decay_on": "product"},
            "weight_decay_on must be factors for a network without linear chains, got 'product'",
        ),
        ({"weight_decay_on": "all"}, "weight_decay_on must be one of factors, product, got 'all'"),
        (
            {"compress": {"group": "auto"}},
            "compress must be left out for a network with expanded layers: contract it first, got",
        ),
        (
            {"model": {"family": "hydranet_resnet", "expand": None}, "init_from": "runs/a"},
            "init_from must be left out for a HydraNet, whose partition is its own, got 'runs/a'",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        config(tmp_path, **changes)
