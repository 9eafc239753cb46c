import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pyeff
from pyeff.cli.main import app

TESTS = Path(__file__).parent.parent
TINY = [
    *("--task", "digits", "--task", "digits:parity", "--backbone", "resnet8", "--levels", "2"),
    *("--width", "4", "--width", "8", "--width", "8", "--epochs", "2", "--batch-size", "32"),
    *("--limit-train", "96", "--limit-test", "64", "--device", "cpu"),
]
COMMAND = [sys.executable, "-c", "from pyeff.cli.main import app; app()"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def interrupted(out, arguments):
    """Starts a run, sends SIGINT when its first epoch is written, returns (code, stderr)."""
    # Sums depend on how many threads share them: as many as in this process.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    return process.returncode, stderr


def test_sigint_saves_and_resume_ends_as_if_nothing_had_been(tmp_path):
    long = [*TINY, "--epochs", "12"]
    out = tmp_path / "a"
    code, stderr = interrupted(out, ["train", "dvn", *long, "--out", str(out)])
    assert code == 130, stderr
    step = int(re.search(r"stopped after step (\d+) of 36", stderr)[1])
    assert 0 < step < 36
    result = invoke("train", "dvn", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    whole = invoke("train", "dvn", *long, "--out", tmp_path / "b")
    assert whole.exit_code == 0, whole.output
    assert records(out) == records(tmp_path / "b")
    tables = [json.loads((tmp_path / d / "results.json").read_text()) for d in "ab"]
    assert tables[0]["results"] == tables[1]["results"]


def test_table_and_files(tmp_path):
    result = invoke("train", "dvn", *TINY, "--epochs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "digits:parity" in result.output
    names = {p.name for p in tmp_path.iterdir()}
    expected = {"checkpoint.safetensors", "model.safetensors", "metrics.jsonl"}
    assert expected | {"results.json", "levels.png"} == names
    again = invoke("train", "dvn", *TINY, "--out", tmp_path)
    assert again.exit_code == 1
    assert "error: train:" in again.output
    assert "must be a new folder" in again.output


def test_resume_refuses_other_settings_and_families(tmp_path):
    assert invoke("train", "dvn", *TINY, "--epochs", "1", "--out", tmp_path).exit_code == 0
    other = invoke("train", "dvn", "--resume", "--levels", "4", "--out", tmp_path)
    assert other.exit_code == 1
    assert "levels: 2 in the checkpoint, 4 here" in other.output
    family = invoke("train", "nestednet", "--resume", "--out", tmp_path)
    assert family.exit_code == 1
    assert "must be a run of nestednet, got one of dvn" in family.output


def test_errors_are_one_line_and_exit_1(tmp_path):
    missing = ("train", "dvn", "--data", tmp_path / "none", "--task", "cifar100:fine")
    result = invoke(*missing, "--out", tmp_path / "o")
    assert result.exit_code == 1
    assert "cifar-100-python must hold the files" in result.output
    assert "does not exist" in result.output
    assert "Traceback" not in result.output
    result = invoke("train", "dvn", "--epochs", "0", "--out", tmp_path / "o")
    assert "error: TrainConfig: epochs must be at least 1, got 0" in result.output
    result = invoke("train", "dvn", "--backbone", "vgg", "--out", tmp_path / "o")
    assert result.exit_code == 1
    assert "backbone must be one of" in result.output


def test_divergence_is_told(tmp_path):
    wild = [*TINY, "--schedule", "constant", "--lr", "1e30", "--out", tmp_path]
    result = invoke("train", "dvn", *wild)
    assert result.exit_code == 1
    assert "losses must be finite" in result.output
    assert "at step" in result.output


def test_decomposeme_and_dec3(tmp_path):
    short = [*("--epochs", "1", "--batch-size", "32", "--device", "cpu"), *TINY[-6:-2]]
    widths = [word for w in (4, 4, 4, 4, 8, 8, 8, 8) for word in ("--width", w)]
    pools = ("--pool", "2", "--pool", "6", "--norm", "none", "--lr", "0.01")
    result = invoke("train", "decomposeme", *short, *widths, *pools, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    model = pyeff.load(tmp_path / "a").config
    assert (model["width"], model["pools"], model["norm"]) == ([4] * 4 + [8] * 4, [2, 6], None)
    result = invoke("train", "dec3", *short, "--width", "8", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    model = pyeff.load(tmp_path / "b").config
    assert (model["family"], model["width"], model["in_channels"]) == ("dec3", 8, 1)
    wrong = invoke("train", "decomposeme", *short, "--width", "7", "--out", tmp_path / "c")
    assert "width must be 512, 640, 768 or 8 widths, got 7" in wrong.output


def test_compress_and_resume_by_name(tmp_path):
    short = [*("--epochs", "3", "--batch-size", "32", "--device", "cpu"), *TINY[-6:-2]]
    words = ["--compress", "group=auto,rank=auto", "--target-params", "0.6", "--reload-epoch", "2"]
    result = invoke("train", "dec3", *short, *words, "--width", "16", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    small = pyeff.load(tmp_path)
    assert small.config["family"] == "compressed"
    document = json.loads((tmp_path / "compression.json").read_text())
    before, after = document["parameters"]
    assert after == sum(p.numel() for p in small.parameters()) <= 0.6 * before
    assert {"neurons.png", "live.png", "ranks.png"} <= {p.name for p in tmp_path.iterdir()}
    again = invoke("train", "dec3", "--resume", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    other = invoke("train", "dec3", "--resume", "--energy", "0.5", "--out", tmp_path)
    assert other.exit_code == 1
    assert "energy: None in the checkpoint, 0.5 here" in other.output
    wrong = invoke("train", "dec3", *short, "--compress", "speed=1", "--out", tmp_path / "c")
    assert wrong.exit_code == 1
    assert "error: compress: options must be among group" in wrong.output


@pytest.mark.parametrize("command", ["dvn", "nestednet", "backbone", "decomposeme", "dec3"])
def test_help_has_an_example(command):
    result = invoke("train", command, "--help")
    assert result.exit_code == 0
    assert f"Example: pyeff train {command}" in " ".join(result.output.split())
