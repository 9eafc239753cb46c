"""The branch operators' own tests, through ``pyeff.backend("triton")``."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from ops import test_branch_conv2d as conv
from ops import test_branch_linear as linear
from ops import test_combine as combine
from ops import test_top_k_routes as routes
from ops.branch_cases import CASES

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    "name", ["1x1", "no bias", "same, even kernel, pairs", "empty batch of pairs"]
)
def test_branch_conv2d(name):
    conv.check(CASES[name], torch.float32, "cpu", "triton")


@pytest.mark.parametrize("name", ["shared rows", "a row for each pair"])
def test_branch_linear(name):
    linear.test_matches_reference(name, torch.bfloat16, "cpu", "triton")


@pytest.mark.parametrize("name", ["no two dimensions equal", "empty batch"])
def test_combine(name):
    combine.test_matches_reference(name, torch.float32, "cpu", "triton")


@pytest.mark.parametrize("weights", ["binary", "softmax"])
def test_top_k_routes(weights, monkeypatch):
    monkeypatch.setattr(routes, "SHAPES", [(0, 5, 2), (7, 20, 4)])
    routes.test_matches_reference(weights, torch.float32, "cpu", "triton")
