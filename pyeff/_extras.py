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
        ImportError: it is not installed, and the message names the extra; or it does not load, such
            as one that was built for another torch.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is needed {purpose}: pip install pyeff[{extra}]", name=package
        ) from error
    except RuntimeError as error:
        raise ImportError(
            f"{package} is needed {purpose}, got one that does not load: {error}", name=package
        ) from error
