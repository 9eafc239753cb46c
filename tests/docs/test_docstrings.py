"""The examples in the docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import pyeff

NAMES = ["pyeff", *(m.name for m in pkgutil.walk_packages(pyeff.__path__, "pyeff."))]


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"pyeff": pyeff, "torch": torch}
    found = finder.find(importlib.import_module(name), name, extraglobs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("._C")])
def test_examples(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        report = []
        runner.run(test, out=report.append)
        assert not report, "".join(report)


def test_there_are_examples():
    assert examples("pyeff.nn.units")
