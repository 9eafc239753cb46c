import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pyeff.convert import contract
from pyeff.deploy import export
from pyeff.models import build_backbone, dvn, smallnet
from pyeff.nn import ExpandedConv2d

module = importlib.import_module("pyeff.deploy.export")
ONNX = ("onnx", "onnxscript", "onnxruntime")


def net(**options):
    """Small, with statistics that a norm left out would show in."""
    model = nn.Sequential(
        ExpandedConv2d(3, 8, 5, 2, padding=2, **options), nn.BatchNorm2d(8), nn.ReLU()
    )
    model[1].running_mean.normal_()
    return model


def images(n=1, side=9):
    return torch.randn(n, 3, side, side)


def test_contracts_writes_and_tells(tmp_path):
    model, x = net(), images()
    path = tmp_path / "deep" / "small.pt2"
    report = export(model, x, path)
    assert model.training
    assert isinstance(model[0], ExpandedConv2d)
    program = torch.export.load(path)
    plain = model[0].contract()
    assert sum(p.numel() for p in program.parameters()) == 16 + sum(
        p.numel() for p in plain.parameters()
    )
    more = images(5)
    torch.testing.assert_close(program.module()(more), model.eval()(more))
    assert report.contracted == ("0",)
    before, after = (sum(p.numel() for p in layer.parameters()) for layer in (model[0], plain))
    assert report.parameters == (before + 16, after + 16)
    assert (report.format, report.size) == ("torch", path.stat().st_size)
    assert 0 <= report.difference <= report.tolerance == 1e-4
    assert 0 < report.contraction < 1e-6
    assert "contracted 1 layers" in str(report)
    assert [p.name for p in path.parent.iterdir()] == ["small.pt2"]


def test_one_size_of_batch(tmp_path):
    export(net(), images(3), tmp_path / "a.pt2", dynamic_batch=False)
    run = torch.export.load(tmp_path / "a.pt2").module()
    assert run(images(3)).shape == (3, 8, 5, 5)
    with pytest.raises(Exception, match="3"):
        run(images(2))


def test_a_network_without_expanded_layers(tmp_path):
    model = build_backbone("resnet8", 4, widths=(4, 8, 8)).eval()
    x = images(2, 16)
    report = export(model, x, tmp_path / "a.pt2")
    assert (report.contracted, report.contraction) == ((), 0.0)
    run = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(run(x), model(x))
    assert "contracted" not in str(report)


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    """What was traced is another network than the one that was given."""
    path = tmp_path / "a.pt2"
    path.write_bytes(b"before")
    whole = module._program

    def spoilt(model, *rest):
        with torch.no_grad():
            model[0].bias += 0.01
        return whole(model, *rest)

    monkeypatch.setattr(module, "_program", spoilt)
    with pytest.raises(ValueError, match=r"export: the program's output must differ by no more"):
        export(net(), images(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_contraction_is_not_written(tmp_path, monkeypatch):
    other = nn.Conv2d(3, 8, 5, 2, padding=2)
    monkeypatch.setattr(ExpandedConv2d, "contract", lambda layer: other)
    with pytest.raises(ValueError, match="contract: outputs must differ by no more than"):
        export(net(), images(), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_non_linear_chain_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layer '0' must equal a plain one"):
        export(net(activation="relu"), images(), tmp_path / "a.pt2")


class _Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class _Two(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: export(torch.relu, images(), p), TypeError, "model must be an nn.Module, got"),
        (lambda p: export(net(), [1], p), TypeError, "example must be a tensor, got list"),
        (
            lambda p: export(net(), images(0), p),
            ValueError,
            r"example must hold an image, got \[0, 3, 9, 9\]",
        ),
        (
            lambda p: export(net(), images(), p, format="tflite"),
            ValueError,
            "format must be 'torch' or 'onnx', got 'tflite'",
        ),
        (
            lambda p: export(_Branching(), images(), p),
            ValueError,
            "model must be traceable by torch.export, got",
        ),
        (
            lambda p: export(_Two(), images(), p),
            ValueError,
            "model must give one tensor, got tuple",
        ),
        (
            lambda p: export(dvn("resnet8", {"a": 2, "b": 2}, 2), images(), p),
            ValueError,
            "example must be an input that the model takes",
        ),
    ],
)
def test_errors(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_extra(tmp_path, monkeypatch):
    def missing(name, extra, purpose):
        raise ImportError(f"{name} is needed {purpose}: pip install pyeff[{extra}]")

    monkeypatch.setattr(module, "require", missing)
    with pytest.raises(ImportError, match=r"needed to write ONNX: pip install pyeff\[export\]"):
        export(net(), images(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX), reason="needs the extra export"
)
def test_onnx(tmp_path):
    import onnxruntime

    model, path = smallnet(5, expand="ck", image_size=16), tmp_path / "small.onnx"
    report = export(model, images(1, 16), path)
    assert report.format == "onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = images(3, 16)
    (found,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_onnx_program_is_run_before_it_is_written(tmp_path, monkeypatch):
    """With the exporter and the runtime in others' place: what the runtime gives is compared."""
    made = SimpleNamespace(model_proto=SimpleNamespace(SerializeToString=lambda: b"program"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: made)
    x = images()
    wanted = contract(net().eval())

    class Session:
        answer = None

        def __init__(self, content, providers):
            assert content == b"program"

        def get_inputs(self):
            return [SimpleNamespace(name="images")]

        def run(self, outputs, inputs):
            return [Session.answer]

    monkeypatch.setattr(module, "require", lambda *_: SimpleNamespace(InferenceSession=Session))
    with torch.no_grad():
        Session.answer = wanted(x).numpy()
    export(wanted, x, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == b"program"
    Session.answer = Session.answer + 1
    with pytest.raises(ValueError, match="the program's output must differ by no more"):
        export(wanted, x, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_what_onnx_has_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require", lambda *_: None)

    def fails(*_, **__):
        raise RuntimeError("no translation of an operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    message = r"operators that ONNX has, got RuntimeError: no translation of an operator$"
    with pytest.raises(ValueError, match=message):
        export(net(), images(), tmp_path / "b.onnx")
    message = r"example must be of a type that NumPy has, got torch\.bfloat16"
    with pytest.raises(ValueError, match=message):
        export(net().bfloat16(), images().bfloat16(), tmp_path / "b.onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"torch\.onnx\.export must give a program, got None"):
        export(net(), images(), tmp_path / "b.onnx")
    assert list(tmp_path.iterdir()) == []
