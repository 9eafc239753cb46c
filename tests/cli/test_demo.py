import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import pyeff
from pyeff.cli import _demo_study
from pyeff.cli._demo_erfnet import print_streets, streets_section
from pyeff.cli.main import app


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--out", str(out), "--epochs", "1", "--budget-macs", "200000"]
    return out, CliRunner().invoke(app, arguments)


class Page(HTMLParser):
    """What a page asks for from elsewhere, and the texts of its table cells."""

    def __init__(self):
        super().__init__()
        self.outside, self.images, self.rows, self.in_cell = [], [], [], False

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                (self.images if value.startswith("data:") else self.outside).append(value)
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag == "td"

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1].append(data)
            self.in_cell = False


@pytest.fixture
def page(run):
    parsed = Page()
    parsed.feed((run[0] / "report.html").read_text())
    return parsed


def test_it_ends_well_and_says_where_the_report_is(run):
    result = run[1]
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert "Budget: 200,000 MACs" in result.output


def test_the_report_needs_nothing_else(page, run):
    assert page.outside == []
    pictures = ["levels.png", "hydranet/branches.png", "streets/frames.png"]
    for image, name in zip(page.images, pictures, strict=True):
        assert base64.b64decode(image.partition("base64,")[2]) == (run[0] / name).read_bytes()
    assert "url(" not in (run[0] / "report.html").read_text()


def test_the_report_has_every_level_beside_the_dense_network(page):
    rows = [row for row in page.rows if row][:10]
    networks = [row[0] for row in rows]
    assert networks == 2 * ["level 1", "level 2", "level 3", "level 4", "dense, alone"]
    for row in rows:
        accuracy, params, macs = row[1], row[2], row[3]
        assert re.fullmatch(r"\d+\.\d%", accuracy)
        assert int(params.replace(",", "")) > 0
        assert int(macs.replace(",", "")) > 0
    params = [int(row[2].replace(",", "")) for row in rows]
    assert params[:4] == sorted(params[:4])
    assert params[3] == params[4]


def test_the_report_has_the_hydranet_with_every_number_of_branches(page, run):
    out, result = run
    rows = [row for row in page.rows if row][10:16]
    names = ["1 of 5", "2 of 5 (as trained)", "3 of 5", "4 of 5", "5 of 5", "dense, alone"]
    assert [row[0] for row in rows] == names
    macs = [int(row[2].replace(",", "")) for row in rows]
    model = pyeff.load(out / "hydranet")
    assert macs[:5] == [model.costs(8, k=k).macs for k in range(1, 6)]
    for row in rows:
        assert re.fullmatch(r"\d+\.\d%", row[1])
        assert all(float(text) > 0 for text in row[3:])
    owned = torch.bincount(model.class_group)
    assert owned.tolist() == [2] * 5
    assert "Digits of each branch: 0: " in result.output


def test_the_report_has_erfnet_and_its_dense_form(page, run):
    out, result = run
    pairs, dense = [row for row in page.rows if row][16:]
    model = pyeff.load(out / "streets")
    cost = model.costs((60, 80))
    assert pairs[:3] == ["pairs of 3 x 1 and 1 x 3", f"{cost.params:,}", f"{cost.macs:,}"]
    assert dense[0] == "3 x 3, not trained"
    assert int(dense[2].replace(",", "")) > cost.macs
    assert all(float(row[3]) > 0 for row in (pairs, dense))
    words = " ".join(result.output.split())
    assert re.search(r"On 32 other scenes the mean IoU is \d+\.\d%", words)


def test_without_what_evaluates_erfnet_the_rest_is_shown_and_it_is_said(monkeypatch):
    message = "torchmetrics is needed to evaluate, got one that does not load"

    def refuse(*arguments):
        raise ImportError(message)

    monkeypatch.setattr(_demo_study, "study_streets", refuse)
    found = _demo_study._study_streets(Path("nowhere"), 1, 0)
    console = Console(record=True, width=200)
    print_streets(found, console)
    assert f"ERFNet on drawn streets was left out: {message}" in console.export_text()
    assert message in streets_section(found)


def test_the_budget_decides_the_level(run):
    out, result = run
    model = pyeff.load(out / "nested")
    for task in ("digit", "parity"):
        level = model.pick(task, max_macs=200_000, input_size=8)
        assert 1 < level < 4
        assert f"{task}: level {level} fits" in result.output


def test_a_budget_below_the_smallest_level_fails_before_training(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d"), "--budget-params", "9"])
    assert result.exit_code == 1
    assert "smallest level's cost" in result.output
    assert not (tmp_path / "d").exists()
