"""Optional dependencies: imported when they are needed, and missed by name."""

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional dependency or says which extra brings it.

    Args:
        module: dotted module name, for example ``"safetensors.torch"``.
        extra: the extra of pyeff that brings it, for example ``"train"``.
        purpose: what it is needed for, as the end of "is needed ...".

    Returns:
        The module.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is needed {purpose}: pip install pyeff[{extra}]", name=package
        ) from error
