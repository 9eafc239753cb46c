"""A picture and its labels, mirrored and moved alike."""

import importlib
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from pyeff._extras import require
from pyeff.train.batches import SampleOrder, generator_of, seed_of
from pyeff.train.segmentation_data import IGNORE, SegmentationSplit

SHIFT = 2


def augment_pairs(
    images: Tensor, labels: Tensor, shift: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mirrors half of the pairs and moves each by up to ``shift`` pixels on either axis.

    What comes into view is black and belongs to no class.

    Args:
        images: uint8 ``[N, H, W, 3]`` on the CPU.
        labels: uint8 ``[N, H, W]``.
        shift: largest move, in pixels.
        generator: the only source of randomness.

    Returns:
        Both, of the same shapes, as copies.

    Source: flip and translation: Romera et al., "ERFNet", T-ITS 2018. The released code fills
        labels with class 0 for moves to one side; here they are ignored on every side.
    """
    n, height, width, channels = images.shape
    low, high = -shift, shift + 1
    down = torch.randint(low, high, (n, 1), generator=generator)
    right = torch.randint(low, high, (n, 1), generator=generator)
    mirrored = torch.randint(0, 2, (n, 1), generator=generator).bool()
    rows = torch.arange(height) - down + shift  # [N, H], into the padded picture
    columns = torch.arange(width) - right
    columns = torch.where(mirrored, width - 1 - columns, columns) + shift  # [N, W]
    edge = (shift, shift, shift, shift)
    padded_images = functional.pad(images, (0, 0, *edge))
    padded_labels = functional.pad(labels, edge, value=IGNORE)
    rows = rows + torch.arange(n).unsqueeze(1) * (height + 2 * shift)
    pixels = (rows.unsqueeze(2) * (width + 2 * shift) + columns.unsqueeze(1)).view(-1)
    return (
        padded_images.view(-1, channels).index_select(0, pixels).view(images.shape),
        padded_labels.view(-1).index_select(0, pixels).view(labels.shape),
    )


def augment_by_torchvision(
    images: Tensor, labels: Tensor, shift: int, seed: int
) -> tuple[Tensor, Tensor]:
    """:func:`augment_pairs` by ``torchvision.transforms.v2``, with random numbers of its own.

    Args:
        images: uint8 ``[N, H, W, 3]`` on the CPU.
        labels: uint8 ``[N, H, W]``.
        shift: largest move, in pixels.
        seed: of this batch.

    Returns:
        Both, of the same shapes, as copies.

    Raises:
        ImportError: torchvision is missing.
    """
    v2 = require("torchvision.transforms.v2", "vision", "to augment pictures")
    kinds = require("torchvision.tv_tensors", "vision", "to augment pictures")
    # A crop of the padded picture is a translation of the picture.
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomCrop(
                list(images.shape[1:3]),
                padding=shift,
                fill={kinds.Image: 0, kinds.Mask: IGNORE},
            ),
        ]
    )
    planes = images.permute(0, 3, 1, 2)
    pairs = []
    # torchvision draws from the global generator; whoever uses that too shall not notice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for image, label in zip(planes, labels, strict=True):
            pairs.append(transform(kinds.Image(image), kinds.Mask(label)))
    moved = torch.stack([image.as_subclass(Tensor) for image, _ in pairs])
    return moved.permute(0, 2, 3, 1), torch.stack([label.as_subclass(Tensor) for _, label in pairs])


@cache
def has_torchvision() -> bool:
    """Whether :func:`augment_by_torchvision` can run; warns of a torchvision that does not load."""
    if find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision.transforms.v2")
    except Exception as error:
        # One that was built for another torch raises whatever it meets.
        warnings.warn(
            f"torchvision is installed but does not load ({error}): pictures are augmented without "
            "it",
            stacklevel=2,
        )
        return False
    return True


def to_input(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` to float32 ``[N, 3, H, W]`` in 0..1, channels_last.

    No mean is taken off: the released recipe trains on plain pixels.
    """
    return (images.float() / 255).permute(0, 3, 1, 2)


class SegmentationBatches:
    """Training batches as functions of (seed, step): see :class:`pyeff.train.batches.BatchStream`.

    Args:
        split: what to learn from.
        batch_size: pictures a step, over all processes.
        seed: of the run.
        augmented: mirror and move.
        by_torchvision: do that by torchvision; by default where it is installed. The two ways draw
            other random numbers.
        rank: this process.
        ranks: number of processes; divides ``batch_size``.

    Attributes:
        by_torchvision: as above, decided.

    Raises:
        ValueError: ``batch_size`` is no multiple of ``ranks``.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        batch_size: int,
        seed: int,
        *,
        augmented: bool = True,
        by_torchvision: bool | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise ValueError(
                f"SegmentationBatches: batch_size must be a multiple of the {ranks} processes, got "
                f"{batch_size}"
            )
        self._split, self._seed, self._augmented = split, seed, augmented
        self._rank, self._ranks = rank, ranks
        # Once for a run: torchvision may be installed while it goes on.
        self.by_torchvision = has_torchvision() if by_torchvision is None else by_torchvision
        self._order = SampleOrder(len(split), batch_size, seed, "segmentation")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of batch ``step``.

        Returns:
            Pictures float32 ``[N, 3, H, W]`` in 0..1 (channels_last), labels int64 ``[N, H, W]``.
        """
        chosen = self._order.indices(step)
        images, labels = self._split.images[chosen], self._split.labels[chosen]
        if self._augmented:
            images, labels = self._augment(images, labels, step)
        share = len(chosen) // self._ranks
        mine = slice(self._rank * share, (self._rank + 1) * share)
        return to_input(images[mine]), labels[mine].long()

    def _augment(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        words = ("segmentation", self._seed, step)
        if self.by_torchvision:
            return augment_by_torchvision(images, labels, SHIFT, seed_of(*words))
        return augment_pairs(images, labels, SHIFT, generator_of(*words))
