"""The operator's own cases, through ``pyeff.backend("triton")``."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: pytest tests/triton/interpreter", allow_module_level=True
    )

from ops.conv_cases import CASES
from ops.test_nested_conv2d import check

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    check(CASES[name], torch.float32, "cpu", "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_in_half_precision(dtype):
    check(CASES["whole groups in the middle"], dtype, "cpu", "triton")
    check(CASES["index on both sides"], dtype, "cpu", "triton")
