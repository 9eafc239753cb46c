import pytest

from pyeff.train import compression_plots
from pyeff.train.compression_plots import (
    SizePoint,
    plot_accuracy_against_parameters,
    plot_neurons,
    plot_per_epoch,
)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture that is written."""
    found = []
    original = compression_plots.write_picture

    def write(figure, path):
        found.append(figure.axes[0])
        original(figure, path)

    monkeypatch.setattr(compression_plots, "write_picture", write)
    return found


def test_bars_of_neurons_before_and_after(tmp_path, drawn):
    plot_neurons({"a": 64, "b": 128}, {"a": 60, "b": 36}, tmp_path / "neurons.png")
    assert (tmp_path / "neurons.png").read_bytes().startswith(b"\x89PNG")
    assert [bar.get_height() for bar in drawn[0].patches] == [64, 128, 60, 36]
    assert [text.get_text() for text in drawn[0].get_xticklabels()] == ["a", "b"]
    assert drawn[0].get_title() == "96 of 192 neurons removed (50%)"


def test_numbers_by_epoch(tmp_path, drawn):
    counts = {2: {"a": 5, "b": 3}, 1: {"a": 8}}
    plot_per_epoch(counts, tmp_path / "ranks.svg", label="rank")
    assert b"<svg" in (tmp_path / "ranks.svg").read_bytes()
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines["a"].get_xdata()) == [1, 2]
    assert list(lines["a"].get_ydata()) == [8, 5]
    assert list(lines["b"].get_xdata()) == [2]
    assert drawn[0].get_ylabel() == "rank"


def test_accuracy_against_parameters(tmp_path, drawn):
    lines = {
        "group sparsity": [SizePoint(2000, 0.7, 0.01), SizePoint(1000, 0.6, 0.02)],
        "dense": [SizePoint(5000, 0.75)],
    }
    plot_accuracy_against_parameters(lines, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    curve = drawn[0].containers[0].lines[0]
    assert list(curve.get_xdata()) == [1000, 2000]
    assert list(curve.get_ydata()) == pytest.approx([60, 70])


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "none.png"
    with pytest.raises(ValueError, match="plot_neurons: before and after must hold the same"):
        plot_neurons({}, {}, path)
    with pytest.raises(ValueError, match=r"got 2 and 1, differing in \['b'\]"):
        plot_neurons({"a": 1, "b": 2}, {"a": 1}, path)
    with pytest.raises(ValueError, match="plot_per_epoch: counts must hold an epoch, got none"):
        plot_per_epoch({}, path)
    with pytest.raises(ValueError, match="lines must hold a point, got none"):
        plot_accuracy_against_parameters({"a": []}, path)
    assert not path.exists()
