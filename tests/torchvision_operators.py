"""torchvision beside a torch that its compiled operators were not built for."""

from importlib import import_module
from importlib.util import find_spec

from torch.library import Library

_DECLARED: list[Library] = []


def torchvision_loads() -> bool:
    """Whether ``torchvision.transforms.v2`` can be imported, and does so.

    The wheels of PyPI are built for torch with CUDA. Beside another torch their operators do not
    load, and the import stops where it describes them: declaring those two is enough for the rest.
    """
    if find_spec("torchvision") is None:
        return False
    try:
        import_module("torchvision.transforms.v2")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _DECLARED:
            raise
        library = Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import_module("torchvision.transforms.v2")
    return True
