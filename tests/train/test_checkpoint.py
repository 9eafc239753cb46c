import json
import os

import pytest
import torch
from torch import nn
from train.tiny import MODEL

import pyeff.checkpoint
from pyeff.checkpoint import load, read_archive, save, write_archive, write_bytes_atomically
from pyeff.models import build


def network(**changes):
    return build({**MODEL, "tasks": {"b": 3, "a": 2}, "in_channels": 1, **changes})


def test_model_comes_back(tmp_path):
    model = network()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.normal_().abs_()
    model.to(memory_format=torch.channels_last)
    save(model, tmp_path / "new" / "model.safetensors")
    again = load(tmp_path / "new" / "model.safetensors")
    assert again.config == model.config
    assert not again.training
    x = torch.randn(2, 1, 8, 8)
    for task in ("a", "b"):
        for level in (1, 2):
            expected = model.eval()(x, task=task, level=level)
            assert torch.equal(again(x, task=task, level=level), expected)


def test_double_stays_double(tmp_path):
    save(network().double(), tmp_path / "m.safetensors")
    assert next(load(tmp_path / "m.safetensors").parameters()).dtype == torch.float64


def test_folder_stands_for_its_final_model(tmp_path):
    write_archive(tmp_path / "checkpoint.safetensors", {}, {"kind": "training"})
    assert read_archive(tmp_path)[1]["kind"] == "training"
    write_archive(tmp_path / "model.safetensors", {}, {"kind": "model"})
    assert read_archive(tmp_path)[1]["kind"] == "model"


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.safetensors must be a whole safetensors file"):
        load(path)


def test_one_flipped_bit_in_a_weight(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"must have checksum .* damaged"):
        load(path)


def test_no_file_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="must name a checkpoint file"):
        load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="must be written by pyeff"):
        load(tmp_path / "f.safetensors")
    write_archive(tmp_path / "x.safetensors", {}, {"kind": "notes"})
    with pytest.raises(ValueError, match="must hold a model, got an archive of 'notes'"):
        load(tmp_path / "x.safetensors")


def test_tensors_of_another_model(tmp_path):
    model = network()
    model.config["widths"] = [4, 8, 16]
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"is \[8, 8, 3, 3\], the model has \[16, 8, 3, 3\]"):
        load(tmp_path / "m.safetensors")


def test_model_without_config(tmp_path):
    with pytest.raises(TypeError, match="must have a config"):
        save(nn.Linear(2, 2), tmp_path / "m.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write_archive(path, {"w": torch.ones(2)}, {"n": 1})

    def broken(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_archive(path, {"w": torch.zeros(2)}, {"n": 2})
    assert read_archive(path)[1] == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_nothing_is_pickled(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["pyeff"])["model"]["family"] == "dvn"


def test_file_is_as_readable_as_any_other(tmp_path):
    write_bytes_atomically(tmp_path / "a", b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install pyeff\[train\]"):
        pyeff.checkpoint.save(network(), tmp_path / "m.safetensors")
