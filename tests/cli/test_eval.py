import json

import pytest
from train.tiny import tiny_config
from typer.testing import CliRunner

import pyeff
from pyeff.checkpoint import save
from pyeff.cli.main import app
from pyeff.train.report import train_and_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train_and_report(tiny_config(out, epochs=1, calibrate=2))


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *[str(a) for a in arguments]])


def test_json_equals_the_training_s_own_figures(run):
    out, trained = run
    result = invoke("--checkpoint", out, "--json")
    assert result.exit_code == 0, result.output
    lines = json.loads(result.output)["results"]
    assert {(r["task"], r["level"]): r["accuracy"] for r in lines} == trained.accuracy
    own = json.loads((out / "results.json").read_text())["results"]
    for line, other in zip(lines, own, strict=True):
        assert line["latency_s"] > 0
        assert {**line, "latency_s": None} == other


def test_table(run):
    result = invoke("--checkpoint", run[0] / "model.safetensors", "--no-latency", "--limit-test", 5)
    assert result.exit_code == 0, result.output
    assert result.output.count("digits:parity") == 2
    assert "acc %" in result.output
    assert "ms" not in result.output.split()
    costs = invoke("--checkpoint", run[0], "--no-latency", "--no-accuracy")
    assert "acc %" not in costs.output
    assert "params" in costs.output


def test_python_loads_the_same_model(run):
    out, trained = run
    model = pyeff.checkpoint.load(out)
    for name, tensor in trained.model.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name


def test_errors(run, tmp_path):
    result = invoke("--checkpoint", tmp_path / "none")
    assert result.exit_code == 1
    assert "error: checkpoint: path must name a checkpoint file" in result.output
    save(pyeff.checkpoint.load(run[0]), tmp_path / "alone.safetensors")
    result = invoke("--checkpoint", tmp_path / "alone.safetensors")
    assert result.exit_code == 1
    assert "must be of a run of pyeff train, got a model alone" in result.output


def test_help_has_an_example():
    result = invoke("--help")
    assert "Example: pyeff eval --checkpoint" in " ".join(result.output.split())
