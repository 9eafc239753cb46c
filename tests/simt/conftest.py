"""The CUDA kernels on the host: ``pytest tests/simt``. Builds them first (``simt_build``)."""

import importlib
import os
import platform
import shutil

import pytest
from sanitised import VARIABLE
from simt_build import COMPILER, load


@pytest.fixture
def simt(request, monkeypatch):
    """``_simt`` with the operators in the test module's ``OPERATORS``.

    ``pyeff.backend("cuda")`` runs on it, with CPU tensors; what was launched is in ``launches()``.
    """
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER} on x86-64")
    from pyeff.ops import _dispatch

    operators = request.module.OPERATORS
    native = load(*operators, sanitized=VARIABLE in os.environ)
    monkeypatch.setattr(_dispatch, "cuda_is_emulated", True)
    for operator in operators:
        if operator != "probe":
            backend = importlib.import_module(f"pyeff.ops._{operator}_cuda")
            monkeypatch.setattr(backend, "native", native)
    native.forget_launches()
    yield native
    native.set_reverse(False)
    native.set_multiprocessors(2)
