"""Training on a GPU, end to end: bf16, channels_last, compiled, in a group of nccl."""

import math

import pytest
import torch
from train.hydra_tiny import hydra_config
from train.segmentation_tiny import segmentation_config
from train.tiny import tiny_config
from train.together import launch, run

from pyeff.checkpoint import read_archive

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COMPRESSED = {
    "tasks": ("digits",),
    "model": {"family": "backbone", "backbone": "resnet8", "widths": [16, 16, 16]},
    "lr": 0.05,
    "compress": {"group": "auto", "rank": "auto"},
    "target_params": 0.6,
    "reload_epoch": 1,
}
EXPANDED = {"tasks": ("digits",), "model": {"family": "smallnet", "expand": "ck", "rate": 2}}
CONFIGS = {
    "nested": lambda out, **more: tiny_config(out, **more),
    "hydranet": lambda out, **more: hydra_config(out, **more),
    "compressed": lambda out, **more: tiny_config(out, **COMPRESSED, **more),
    "expanded": lambda out, **more: tiny_config(out, **EXPANDED, **more),
}


@pytest.fixture(autouse=True)
def training():
    """``pyeff.train``, where the machine has what it needs."""
    for name in ("sklearn", "safetensors", "matplotlib", "torchmetrics", "PIL"):
        pytest.importorskip(name)
    return pytest.importorskip("pyeff.train")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_in_bf16(training, tmp_path, name, compiled):
    config = CONFIGS[name](tmp_path, device=DEVICE, precision="bf16", compile=compiled)
    result = training.Trainer(config).fit()
    losses = [record["train_loss"] for record in result.records]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert {parameter.device.type for parameter in result.model.parameters()} == {DEVICE}
    assert training.Trainer(config).fit(resume=True).accuracy == result.accuracy


# Not the compressed one: where factors are faster depends on the device.
@pytest.mark.parametrize("name", ["nested", "hydranet", "expanded"])
def test_learns_what_the_cpu_learns(training, tmp_path, name):
    records = {}
    for device in ("cpu", DEVICE):
        config = CONFIGS[name](tmp_path / device, device=device, precision="fp64", epochs=1)
        records[device] = training.Trainer(config).fit().records
    for there, here in zip(records[DEVICE], records["cpu"], strict=True):
        assert there["train_loss"] == pytest.approx(here["train_loss"], rel=1e-6)


def test_segmentation_in_bf16(training, tmp_path):
    config = segmentation_config(tmp_path, device=DEVICE, precision="bf16")
    result = training.SegmentationTrainer(config).fit()
    assert {parameter.device.type for parameter in result.model.parameters()} == {DEVICE}


def test_a_group_of_nccl_computes_what_one_process_does(tmp_path):
    launch("distributed_run.py", tmp_path / "group", "sum joint", DEVICE, processes=1)
    joint, _ = read_archive(tmp_path / "group" / "checkpoint.safetensors")
    alone, _ = run("distributed_run.py", tmp_path / "alone", "sum joint", processes=1)
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(joint[name], tensor, rtol=1e-6, atol=1e-6)
