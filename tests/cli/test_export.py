"""`pyeff train smallnet`, and `pyeff export` of what it and others left behind."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pyeff
from pyeff.cli.main import app

TINY = [
    *("--task", "digits", "--epochs", "1", "--batch-size", "32", "--limit-train", "64"),
    *("--limit-test", "32", "--device", "cpu"),
]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ck"
    result = invoke("train", "smallnet", *TINY, "--expand", "ck+fc", "--rate", "2", "--out", out)
    assert result.exit_code == 0, result.output
    assert "best epoch by the test images" in result.output
    return out


def test_train_smallnet_has_the_papers_recipe(trained):
    config = json.loads((trained / "results.json").read_text())["config"]
    assert config["model"] == {
        "family": "smallnet",
        "kernel": 7,
        "expand": "ck+fc",
        "rate": 2.0,
        "activation": None,
        "form": "auto",
    }
    recipe = {"lr": 0.01, "weight_decay": 0.0, "schedule": "thirds", "nesterov": False}
    assert {name: config[name] for name in recipe} == recipe
    assert (config["weight_decay_on"], config["init_from"]) == ("factors", None)
    assert "[default: 150]" in " ".join(invoke("train", "smallnet", "--help").output.split())
    # Other networks keep their own.
    assert "[default: 150]" not in " ".join(invoke("train", "dec3", "--help").output.split())


def test_train_smallnet_from_a_non_linear_run_and_resume(trained, tmp_path):
    words = ["train", "smallnet", *TINY, "--expand", "ck"]
    result = invoke(*words, "--activation", "relu", "--out", tmp_path / "relu")
    assert result.exit_code == 0, result.output
    decay = ("--weight-decay", "0.01", "--weight-decay-on", "product", "--form", "contracted")
    start = ("--init-from", tmp_path / "relu", "--out", tmp_path / "linear")
    result = invoke(*words, *decay, *start)
    assert result.exit_code == 0, result.output
    assert pyeff.load(tmp_path / "linear").config["activation"] is None
    result = invoke("train", "smallnet", "--resume", "--out", tmp_path / "linear")
    assert result.exit_code == 0, result.output
    other = invoke("train", "smallnet", "--resume", "--expand", "cl", "--out", tmp_path / "linear")
    assert other.exit_code == 1
    assert "expand: 'ck' in the checkpoint, 'cl' here" in other.output
    refused = invoke("export", tmp_path / "relu", "--out", tmp_path / "a.pt2")
    assert refused.exit_code == 1
    assert "error: contract: layer 'conv1' must equal a plain one" in refused.output
    assert not (tmp_path / "a.pt2").exists()


def test_eval_tells_the_cost_of_the_contracted_network(trained):
    result = invoke("eval", "--checkpoint", trained, "--no-latency", "--json")
    assert result.exit_code == 0, result.output
    (line,) = json.loads(result.output)["results"]
    plain = pyeff.models.smallnet(10, in_channels=1, image_size=8)
    assert line["params"] == sum(p.numel() for p in plain.parameters())


def test_export_contracts_and_writes(trained, tmp_path):
    out = tmp_path / "small.pt2"
    result = invoke("export", trained, "--out", out)
    assert result.exit_code == 0, result.output
    assert "contracted 4 layers" in result.output
    model, run = pyeff.load(trained), torch.export.load(out).module()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    told = invoke("export", trained, "--out", out, "--no-dynamic-batch", "--json")
    assert told.exit_code == 0, told.output
    document = json.loads(told.output)
    assert document["contracted"] == ["conv1", "conv2", "conv3", "fc1"]
    assert document["size"] == out.stat().st_size
    with pytest.raises(Exception, match=r"1"):
        torch.export.load(out).module()(x)


def test_export_of_a_level(tmp_path):
    model = pyeff.models.dvn("resnet8", {"a": 3, "b": 2}, 2, widths=(4, 8, 8))
    pyeff.save(model, tmp_path / "m.safetensors")
    words = ("export", tmp_path / "m.safetensors", "--out", tmp_path / "a.pt2", "--size", "8x12")
    result = invoke(*words, "--task", "b", "--level", "1")
    assert result.exit_code == 0, result.output
    x = torch.randn(2, 3, 8, 12)
    run = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(run(x), model.eval()(x, task="b", level=1), rtol=1e-4, atol=1e-4)
    which = invoke(*words)
    assert which.exit_code == 1
    assert "task must be one of" in which.output


def test_export_tells_what_is_wrong(trained, tmp_path):
    alone = tmp_path / "m.safetensors"
    pyeff.save(pyeff.models.unet_small(3, widths=(4, 8)), alone)
    for words, message in [
        ((tmp_path / "none",), "path must name a checkpoint file"),
        ((alone,), "export: size must be given for a network that was saved without its run"),
        ((trained, "--size", "8"), "--size must be HEIGHTxWIDTH"),
        ((trained, "--size", "9x9"), "must have 8 rows and columns"),
        ((trained, "--level", "1"), "task and level must be left out for SmallNet"),
        ((trained, "--tolerance", "-1"), "must differ by no more than -1.0e+00"),
    ]:
        result = invoke("export", *words, "--out", tmp_path / "a.pt2")
        assert result.exit_code == 1
        assert f"{message}" in " ".join(result.output.split())
        assert result.output.startswith("error: ")
        assert not (tmp_path / "a.pt2").exists()
    assert invoke("export", alone, "--size", "9x9", "--out", tmp_path / "a.pt2").exit_code == 0


def test_help_has_an_example():
    assert "Example: pyeff export runs/ck" in " ".join(invoke("export", "--help").output.split())
    shown = " ".join(invoke("train", "smallnet", "--help").output.split())
    assert "Example: pyeff train smallnet" in shown
