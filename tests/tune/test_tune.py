"""`pyeff tune` measures, writes, and what it wrote chooses backends."""

import json
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

import pyeff
import pyeff.tune
from pyeff import _measured
from pyeff._measured import Row, Table, TileRow
from pyeff.cli.main import app
from pyeff.ops import _dispatch
from pyeff.tune.cases import OPERATORS
from pyeff.tune.timing import seconds_of

SMALL = {"dtypes": [torch.float32], "channels": [8], "images": [(1, 4), (2, 4)]}
CPU_OPERATORS = [op for op in OPERATORS if op != "factorized_conv2d"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A place of its own for the tables."""
    monkeypatch.setattr(_measured, "folder", tmp_path)
    _measured.table.cache_clear()
    yield tmp_path
    _measured.table.cache_clear()


def row(op="nested_conv2d", direction="forward", dtype="float32", size=(16, 64), **seconds):
    return Row(op, direction, dtype, *size, seconds)


def saved(*rows, device=None):
    return pyeff.tune.save(Table(device or _measured.device_name("cpu"), rows))


def chosen(x, direction="forward"):
    return _dispatch.choose("nested_conv2d", x, direction=direction)


@pytest.mark.parametrize("op", CPU_OPERATORS)
def test_every_direction_of_an_operator_is_measured_on_every_backend(op):
    heard = []
    table = pyeff.tune.tune(
        "cpu", operators=[op], slice_seconds=0, progress=lambda *told: heard.append(told), **SMALL
    )
    assert {r.direction for r in table.rows} == set(_dispatch.directions(op, "cpu"))
    assert {r.op for r in table.rows} == {op}
    for found in table.rows:
        assert set(found.seconds) == {"cpp", "torch"}
        assert min(found.seconds.values()) > 0
    assert [done for done, _, _ in heard] == list(range(len(heard)))
    assert {total for _, total, _ in heard} == {len(heard)} == {2}


def test_each_candidate_runs_on_its_backend(monkeypatch):
    entered = []

    @contextmanager
    def backend(name):
        entered.append(name)
        with pyeff.backend(name):
            yield

    def timed(calls, device, slice_seconds):
        for name, call in calls.items():
            entered.clear()
            call()
            assert entered == [name]
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr("pyeff.tune.tuner.backend", backend)
    monkeypatch.setattr("pyeff.tune.tuner.seconds_of", timed)
    table = pyeff.tune.tune("cpu", **SMALL)
    assert {found.op for found in table.rows} == set(CPU_OPERATORS)


def test_the_nearest_shape_of_the_same_direction_and_dtype_decides():
    assert chosen(torch.empty(1, 16, 8, 8)) == "cpp"
    saved(
        row(torch=1.0, cpp=2.0),
        row(torch=2.0, cpp=1.0, size=(256, 16384)),
        row(torch=1.0, cpp=2.0, direction="grad_input", size=(256, 16384)),
    )
    assert chosen(torch.empty(1, 16, 8, 8)) == "torch"
    assert chosen(torch.empty(2, 24, 8, 8)) == "torch"
    assert chosen(torch.empty(4, 200, 50, 50)) == "cpp"
    assert chosen(torch.empty(4, 200, 50, 50), "grad_input") == "torch"
    assert chosen(torch.empty(1, 16, 8, 8), "train") == "cpp"  # not measured: as shipped
    assert chosen(torch.empty(1, 16, 8, 8, dtype=torch.float64)) == "cpp"
    assert chosen(torch.empty(0, 16, 8, 8)) == "torch"
    with pyeff.backend("cpp"):
        assert chosen(torch.empty(1, 16, 8, 8)) == "cpp"


def test_results_stay_right_whatever_was_measured():
    saved(row(torch=1.0, cpp=2.0), row(torch=1.0, cpp=2.0, direction="train"))
    x, weight = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(pyeff.ops.nested_conv2d(x, weight, padding=1), expected)
    compiled = torch.compile(
        lambda x: pyeff.ops.nested_conv2d(x, weight, padding=1), backend="aot_eager", dynamic=True
    )
    torch.testing.assert_close(compiled(x), expected)


def test_sizes_count_channels_and_all_pixels():
    assert _measured.size_of((2, 3, 5, 7)) == (3, 70)
    assert _measured.size_of((2, 4, 3, 5, 7)) == (3, 280)
    assert _measured.size_of((6, 8)) == (8, 6)
    assert _measured.size_of((6, 2, 8)) == (8, 12)
    assert _measured.size_of((2, 0, 5, 5)) == (0, 0)


def test_a_table_of_another_device_does_not_count():
    saved(row(torch=1.0, cpp=2.0), device="another processor")
    assert chosen(torch.empty(1, 16, 8, 8)) == "cpp"


def test_a_table_comes_back_from_its_file():
    tile = TileRow("gemm", "half", 4096, 64, 1, (64, 64, 64, 4, 4))
    table = Table("a device", [row(torch=1.0)], [tile], {"torch": "2"})
    again = _measured.read(pyeff.tune.save(table))
    assert again.to_json() == table.to_json()
    assert again.tile("gemm", "half", (5000, 70, 1)) == tile.tile
    assert again.tile("gemm", "tf32", (5000, 70, 1)) is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"format": 7}), "format 7, expected 1"),
        (json.dumps({"format": 1, "rows": [{}]}), "TypeError"),
    ],
)
def test_a_broken_table_warns_and_the_shipped_one_counts(content, named, folder):
    path = _measured.path_of(_measured.device_name("cpu"))
    path.write_text(content)
    with pytest.warns(UserWarning, match=named):
        assert chosen(torch.empty(1, 16, 8, 8)) == "cpp"
    with pytest.raises(ValueError, match="must be one that pyeff tune wrote"):
        _measured.read(path)


def test_what_cannot_be_tuned_is_named():
    with pytest.raises(ValueError, match=r"operators must be of .* on cpu, got 'conv'"):
        pyeff.tune.tune("cpu", operators=["conv"])
    with pytest.raises(ValueError, match=r"got 'factorized_conv2d'"):
        pyeff.tune.tune("cpu", operators=["factorized_conv2d"])
    with pytest.raises(ValueError, match="device must be auto, cpu or a CUDA device, got meta"):
        pyeff.tune.tune("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device cuda must be usable, got a machine without CUDA"):
        pyeff.tune.tune("cuda")


def test_times_are_medians_of_one_call():
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    found = seconds_of(
        {name: lambda name=name: call(name) for name in calls}, torch.device("cpu"), 1e-4
    )
    assert set(found) == {"a", "b"}
    assert all(0 < seconds < 1e-3 for seconds in found.values())
    assert min(calls.values()) > 7


COMMAND = ["tune", "--device", "cpu", "--operator", "combine", "--dtype", "float32"]
SHORT = ["--channels", "8", "--slice-seconds", "0"]


def test_the_command_writes_what_info_names_and_dispatch_reads(folder):
    result = CliRunner().invoke(app, [*COMMAND, *SHORT])
    assert result.exit_code == 0, result.output
    (path,) = folder.iterdir()
    assert str(path) in result.output.replace("\n", "")
    assert list(pyeff.info()["tuned"].values()) == [str(path)]
    assert _measured.table("cpu", None).rows == _measured.read(path).rows != ()


def test_the_command_writes_elsewhere_and_prints_json(folder, tmp_path):
    out = tmp_path / "deep" / "table.json"
    result = CliRunner().invoke(app, [*COMMAND, *SHORT, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert pyeff.info()["tuned"] == {}


@pytest.mark.parametrize("words", [["--dtype", "float8"], ["--operator", "conv"]])
def test_the_command_names_bad_words(words, folder):
    result = CliRunner().invoke(app, ["tune", "--device", "cpu", *words])
    assert result.exit_code == 1
    assert f"got {words[1]!r}" in result.output
    assert not list(folder.iterdir())
