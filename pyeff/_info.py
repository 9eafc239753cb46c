"""What this installation can do on this machine."""

import platform
from importlib import util
from typing import Any

import torch

from pyeff import _C, _measured


def info() -> dict[str, Any]:
    """Describes the build and the machine, in values that JSON can hold.

    Returns:
        ``version``, ``python``, ``torch``: version strings. ``compiler``: of the extension.
        ``isa``: the instruction set in use, ``isas`` those that can be forced. ``threads``: how
        many the kernels use, which is torch's number. ``cuda``: whether CUDA kernels are built,
        for which architectures, the linked runtime, the devices that it sees or why there are
        none. ``triton``: its version or None, and the architectures that the kernels are compiled
        and tested for. ``tuned``: by device, the file that ``pyeff tune`` wrote and that chooses
        backends.

    Example:
        >>> facts = pyeff.info()
        >>> facts["isa"] in facts["isas"]
        True
    """
    return {
        "version": _C.version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "compiler": _C.compiler,
        "isa": _C.isa(),
        "isas": _C.available_isas(),
        "threads": torch.get_num_threads(),
        "cuda": _C.cuda_info(),
        "triton": {"version": _triton_version(), "architectures": ["sm_80", "sm_90", "sm_100"]},
        "tuned": _tuned(),
    }


def _tuned() -> dict[str, str]:
    names = [_measured.device_name("cpu")]
    names += [_measured.device_name("cuda", i) for i in range(torch.cuda.device_count())]
    paths = {name: _measured.path_of(name) for name in names}
    return {name: str(path) for name, path in paths.items() if path.exists()}


def _triton_version() -> str | None:
    # Importing Triton takes a second; its metadata does not.
    if util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"
