import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train.segmentation_tiny import camvid_tree, folder_tree
from typer.testing import CliRunner

from pyeff.cli.main import app

TINY = [
    *("--width", "4", "--width", "8", "--width", "12", "--size", "16x24", "--device", "cpu"),
    *("--batch-size", "4", "--scenes", "6", "--limit-test", "3"),
]
SHORT = [*TINY, "--stage1-epochs", "1", "--epochs", "2"]
# As tests/conftest.py does for this process.
LOADS = "from torchvision_operators import torchvision_loads; torchvision_loads()"
COMMAND = [sys.executable, "-c", f"{LOADS}; from pyeff.cli.main import app; app()"]
TESTS = Path(__file__).resolve().parents[1]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(*arguments):
    return invoke("train", "erfnet", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = train(*SHORT, "--eval-size", "official", "--order", "horizontal_first", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_files_and_table(run):
    out, text = run
    names = {path.name for path in out.iterdir()}
    weights = {"checkpoint.safetensors", "model.safetensors", "best.safetensors"}
    assert names == weights | {"metrics.jsonl", "results.json", "course.png", "frames.png"}
    assert "test, training size (16x24)" in " ".join(text.split())
    for word in ("bicyclist", "mean", "pixel accuracy", "parameters", "GMAC at 16x24"):
        assert word in text
    model = json.loads((out / "results.json").read_text())["config"]["model"]
    assert model == {
        "family": "erfnet",
        "order": "horizontal_first",
        "dense": False,
        "widths": [4, 8, 12],
    }


def test_eval_says_what_training_said(run):
    own = json.loads((run[0] / "results.json").read_text())
    result = invoke("eval", "--checkpoint", run[0], "--json", "--eval-size", "official")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["results"] == own["results"]
    assert document["cost"]["latency_s"] > 0
    assert {**document["cost"], "latency_s": None} == own["cost"]
    table = invoke("eval", "--checkpoint", run[0], "--split", "val", "--no-latency")
    assert "val, training size (16x24)" in " ".join(table.output.split())
    assert "official" not in table.output
    costs = invoke("eval", "--checkpoint", run[0], "--no-accuracy", "--no-latency")
    assert costs.exit_code == 0, costs.output
    assert "IoU" not in costs.output
    assert "ms a picture" not in costs.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--k", "2"), "k must be left out for ERFNet, got 2"),
        (
            ("--split", "train2"),
            "split must be one of train, val and test, if streets has it, got 'train2'",
        ),
        (("--eval-size", "huge"), "eval_size must be one of training, official, got 'huge'"),
    ],
)
def test_eval_refuses(run, arguments, error):
    result = invoke("eval", "--checkpoint", run[0], *arguments)
    assert result.exit_code == 1
    assert error in " ".join(result.output.split())


def test_eval_takes_fewer_pictures(run):
    fewer = invoke("eval", "--checkpoint", run[0], "--limit-test", 1, "--no-latency", "--json")
    assert json.loads(fewer.output)["results"][0]["images"] == 1


def test_data_of_ones_own_and_eval_on_other_classes(tmp_path):
    data, out = folder_tree(tmp_path / "mine"), tmp_path / "out"
    result = train(
        *("--dataset", "folder", "--data", data, "--dense", "--out", out),
        *(*TINY, "--stage1-epochs", "0", "--epochs", "1"),
    )
    assert result.exit_code == 0, result.output
    assert "traffic sign" in result.output
    assert json.loads((out / "results.json").read_text())["config"]["model"]["dense"] is True
    (data / "classes.txt").write_text("road\nsign\ncar\n")
    other = invoke("eval", "--checkpoint", out, "--no-latency")
    assert other.exit_code == 1
    assert "data must have the classes of" in other.output


def test_predict(run, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    common = ("predict", "erfnet", "--checkpoint", run[0], "--images", tmp_path / "a.png")
    text = invoke(*common, "--out", tmp_path / "one")
    assert text.exit_code == 0, text.output
    assert re.search(r"a_overlay\.png  \d+ ms a frame  \w+ \d+%", text.output)
    assert (tmp_path / "one" / "a_labels.png").exists()
    result = invoke(*common, "--out", tmp_path / "two", "--size", "own", "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.output)["predictions"]
    assert entry["source"] == str(tmp_path / "a.png")
    assert Image.open(entry["labels"]).size == (30, 20)
    for wrong, error in (
        (("--size", "20"), "--size must be HEIGHTxWIDTH, such as 180x240, got '20'"),
        (("--opacity", "2"), "opacity must be in [0, 1], got 2"),
        (("--images", tmp_path / "none"), "must name files or folders, got"),
    ):
        refused = invoke(*common, *wrong, "--out", tmp_path / "three")
        assert refused.exit_code == 1
        assert error in " ".join(refused.output.split())
        assert "Traceback" not in refused.output


def test_camvid_from_drawn_streets(run, tmp_path):
    camvid_tree(tmp_path / "data", size=(32, 48), counts=(4, 2, 2))
    result = train(
        *("--dataset", "camvid", "--data", tmp_path / "data", "--out", tmp_path / "out"),
        *("--init-from", run[0], "--order", "horizontal_first", "--eval-size", "official"),
        *(*TINY, "--stage1-epochs", 0, "--epochs", 1, "--precision", "bf16"),
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["left_fresh"] == []
    assert [tuple(r["size"]) for r in document["results"]] == [(16, 24), (32, 48)]
    # The data may have moved since.
    (tmp_path / "data").rename(tmp_path / "moved")
    gone = invoke("eval", "--checkpoint", tmp_path / "out", "--no-latency")
    assert gone.exit_code == 1
    assert "must hold the folders" in gone.output
    there = invoke(
        "eval",
        "--checkpoint",
        tmp_path / "out",
        "--no-latency",
        "--json",
        "--data",
        tmp_path / "moved",
    )
    assert json.loads(there.output)["results"] == document["results"][:1]


def interrupted(out, arguments):
    """Starts a run, sends SIGINT when its first epoch is written, returns (code, stderr)."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    return process.returncode, stderr


def test_sigint_saves_and_resume_goes_on(tmp_path):
    code, stderr = interrupted(
        tmp_path,
        [
            "train",
            "erfnet",
            *TINY,
            "--stage1-epochs",
            "1",
            "--epochs",
            "12",
            "--out",
            str(tmp_path),
        ],
    )
    assert code == 130, stderr
    step = int(re.search(r"stopped after step (\d+) of 26", stderr)[1])
    assert 0 < step < 26
    other = train("--resume", "--lr", 1, "--out", tmp_path)
    assert other.exit_code == 1
    assert "lr: 0.0005 in the checkpoint, 1.0 here" in other.output
    result = train("--resume", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(2, 27, 2))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--dataset", "camvid"), "camvid: data must name the folder that holds CamVid, got none"),
        (("--dataset", "none"), "dataset must be one of camvid, cityscapes, folder, streets"),
        (("--size", "180"), "--size must be HEIGHTxWIDTH, such as 180x240, got '180'"),
        (("--order", "sideways"), "sideways"),
        (("--init-from", "none"), "path must name a checkpoint file, got none"),
        (("--width", "9"), "widths must be 3 rising ints"),
    ],
)
def test_errors_are_one_line_and_exit_1(tmp_path, arguments, error):
    short = [*TINY, "--limit-test", "1", "--scenes", "1", "--out", tmp_path / "out"]
    result = train(*short, *arguments)
    assert result.exit_code == 1
    assert "error: " in result.output
    assert error in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_divergence_is_told(tmp_path):
    result = train(*SHORT, "--lr", "1e30", "--out", tmp_path)
    assert result.exit_code == 1
    assert "losses must be finite" in result.output


@pytest.mark.parametrize("command", ["train", "predict"])
def test_help_has_an_example(command):
    result = invoke(command, "erfnet", "--help")
    assert result.exit_code == 0
    assert f"Example: pyeff {command} erfnet" in " ".join(result.output.split())
