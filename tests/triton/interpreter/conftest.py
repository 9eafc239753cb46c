"""These tests need a process of their own: ``pytest tests/triton/interpreter``.

``TRITON_INTERPRET`` must be set before triton is imported, and then no kernel in that process can
be compiled any more. So it is set only when nothing but this folder was asked for; otherwise the
modules skip themselves.
"""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def pytest_configure(config):
    start = config.invocation_params.dir
    paths = [Path(start, argument.split("::")[0]).resolve() for argument in config.args]
    if not paths or not all(path == _HERE or _HERE in path.parents for path in paths):
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before the interpreter could be switched on")
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter_shim import install

    install()
