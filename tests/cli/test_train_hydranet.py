import json

import pytest
from typer.testing import CliRunner

from pyeff.cli.main import app

SHORT = [
    *("--epochs", "1", "--batch-size", "32", "--limit-train", "96", "--limit-test", "64"),
    *("--device", "cpu"),
]
TINY = [*SHORT, "--n-b", "5", "--k", "2", "--w-s", "0.25", "--w-b", "0.25"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(*arguments):
    return invoke("train", "hydranet", *TINY, *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    reference = ("--reference-backbone", "resnet8", "--reference-epochs", "1")
    result = train("-d", "1", *reference, "--partition-method", "assignment", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_files_and_table(run):
    out, text = run
    names = {path.name for path in out.iterdir()}
    pictures = {"levels.png", "use.png", "branches.png"}
    kept = {"checkpoint.safetensors", "model.safetensors", "metrics.jsonl", "results.json"}
    assert names == pictures | kept | {"partition.json", "settings.json", "reference"}
    assert json.loads((out / "partition.json").read_text())["method"] == "assignment"
    assert "digits:class" in text
    assert "gate: top-1" in text
    assert "entropy of use" in text


def test_options_reach_the_network(run):
    config = json.loads((run[0] / "results.json").read_text())["config"]
    model = config["model"]
    assert model["family"] == "hydranet_resnet"
    assert [model[name] for name in ("n_b", "k", "w_s", "w_b", "d")] == [5, 2, 0.25, 0.25, 1]
    assert "w_g" not in model
    assert config["tasks"] == ["digits:class"]


def test_eval_says_what_training_said(run):
    own = json.loads((run[0] / "results.json").read_text())["results"]
    result = invoke("eval", "--checkpoint", run[0], "--no-latency", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["results"] == own
    (fewer,) = json.loads(
        invoke("eval", "--checkpoint", run[0], "--no-latency", "--json", "--k", 1).output
    )["results"]
    assert fewer["macs"] < own[0]["macs"]
    table = invoke("eval", "--checkpoint", run[0], "--no-latency")
    assert "gate: top-1" in table.output
    costs = invoke("eval", "--checkpoint", run[0], "--no-latency", "--no-accuracy")
    assert costs.exit_code == 0, costs.output
    assert "gate" not in costs.output


def test_resume_knows_the_family(run):
    again = invoke("train", "hydranet", "--resume", "--out", run[0])
    assert again.exit_code == 0, again.output
    other = invoke("train", "hydranet", "--resume", "--model", "hydranet_densenet", "--out", run[0])
    assert other.exit_code == 1
    assert "must be a run of hydranet_densenet, got one of hydranet_resnet" in other.output
    nested = invoke("train", "nestednet", "--resume", "--out", run[0])
    assert "must be a run of nestednet, got one of hydranet_resnet" in nested.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        # Before the reference classifier is trained, too.
        (("--k", "6"), "k must be in 1..5, got 6"),
        (("--partition", "none.json"), "partition must be auto, random or a JSON file, got none"),
        (("--reference", "none"), "must name a checkpoint file, got none"),
        (("--gate", "wise"), "wise"),
        (("--partition-method", "magic"), "partition_method must be one of greedy, assignment"),
        (("--model", "hydranet_none", "--partition", "random"), "got 'hydranet_none'"),
        (("--gate-loss-weight", "-1"), "gate_loss_weight must not be negative, got -1"),
    ],
)
def test_errors_are_one_line_and_exit_1(tmp_path, arguments, error):
    result = train(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "error: " in result.output
    assert error in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_k_is_refused_for_a_network_without_branches(tmp_path):
    result = invoke("train", "backbone", *SHORT, "--backbone", "resnet8", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    result = invoke("eval", "--checkpoint", tmp_path, "--k", 2)
    assert result.exit_code == 1
    assert "k must be left out for a network without branches, got 2 for a ResNet" in result.output
