"""Characters from natural scenes: 36 classes, 0-9 and A-Z, as an image folder."""

from pathlib import Path

import torch
from torch import Tensor

from pyeff.train.folder import read_folder

FOLDER = "chars74k"
_Split = tuple[Tensor, Tensor]
# ITU-R BT.601, as grey pictures are usually made.
_LUMA = (0.299, 0.587, 0.114)


def read_chars74k(
    data: Path | None, colour: str = "", image_size: int | None = None
) -> tuple[_Split, _Split, list[str]]:
    """Reads ``data/chars74k/{train,test}/<class>/*.png`` into memory.

    Args:
        data: the folder that holds ``chars74k``.
        colour: ``""`` for RGB, ``"grey"`` for one channel.
        image_size: side in pixels to which every image is scaled; ``None`` takes them as they are.

    Returns:
        Training and test ``(images uint8 [N, H, W, C], labels int64 [N])``, and class names. The
        order is shuffled, always alike, so that the first images are a fair sample.

    Raises:
        ValueError: no data folder was named; the tree is missing or broken; names the path.
        ImportError: pillow is missing.

    Source: de Campos, Babu, Varma, "Character Recognition in Natural Images", VISAPP 2009.
    """
    if data is None:
        raise ValueError(f"chars74k: data must name the folder that holds {FOLDER}, got none")
    read_train, read_test, names = read_folder(data / FOLDER, image_size)
    train, test = _shuffled(*read_train), _shuffled(*read_test)
    if colour == "grey":
        return (_grey(train[0]), train[1]), (_grey(test[0]), test[1]), names
    return train, test, names


def _shuffled(images: Tensor, labels: Tensor) -> _Split:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def _grey(images: Tensor) -> Tensor:
    """``[N, H, W, 3]`` to the luma ``[N, H, W, 1]``, rounded."""
    luma = images.float() @ torch.tensor(_LUMA)
    return luma.round().to(torch.uint8).unsqueeze(-1)
