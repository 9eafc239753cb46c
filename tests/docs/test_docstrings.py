"""The examples in the docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import pyeff

ROOT = Path(__file__).resolve().parents[2]
PATHS = [path.relative_to(ROOT) for path in sorted((ROOT / "pyeff").rglob("*.py"))]
NAMES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PATHS]


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"pyeff": pyeff, "torch": torch}
    found = finder.find(importlib.import_module(name), name, extraglobs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        report = []
        runner.run(test, out=report.append)
        assert not report, "".join(report)


def test_there_are_examples():
    assert examples("pyeff.nn.units")
