"""Smaller networks trained on by the original's outputs, for which images need no labels.

Part of compress_efficientnet.py. Half of every batch are crops of CamVid's training frames, half
are images of CIFAR-100, enlarged: what is at hand in place of ImageNet. Neither is among the images
by which networks are compared.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from efficientnet_lite import SIDE, frames, to_network
from torch import Tensor, nn
from torch.nn import functional

from pyeff.train.calibrate import calibrate
from pyeff.train.cifar import read_cifar100
from pyeff.train.progress_bar import progress_bar

BATCH, RATE, WARM_UP = 32, 1e-3, 0.1
# Batches from which batch norm statistics are computed anew before the first step.
CALIBRATION = 8
# Sides of a crop, in pixels of a frame and of an image of CIFAR.
_OF_FRAMES, _OF_CIFAR = (190, 360), (24, 32)


@dataclass(frozen=True)
class Views:
    """Random views of images without labels.

    Attributes:
        frames: uint8 ``[N, 3, H, W]``.
        small: uint8 ``[N, 3, 32, 32]``.
        seed: of the views.
    """

    frames: Tensor
    small: Tensor
    seed: int = 0

    @classmethod
    def of(cls, data: Path) -> "Views":
        """Those of CamVid's training frames and CIFAR-100's training images.

        Raises:
            ValueError: the folder lacks one of them.
        """
        found = [torch.from_numpy(f.copy()) for f in frames(data, None, "train").values()]
        (small, _), _, _ = read_cifar100(data, "fine")
        return cls(torch.stack(found).permute(0, 3, 1, 2), small.permute(0, 3, 1, 2))

    def batches(self, count: int) -> Iterator[Tensor]:
        """Batches of ``[32, 3, 224, 224]``, normalised; the same ones every time."""
        noise = torch.Generator().manual_seed(self.seed)
        for _ in range(count):
            parts = [_crops(self.frames, BATCH // 2, _OF_FRAMES, noise)]
            parts.append(_crops(self.small, BATCH - BATCH // 2, _OF_CIFAR, noise))
            yield to_network(torch.cat(parts))


def _crops(images: Tensor, count: int, sides: tuple[int, int], noise: torch.Generator) -> Tensor:
    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=noise))

    found = []
    for _ in range(count):
        image, side = images[draw(len(images))], sides[0] + draw(sides[1] - sides[0] + 1)
        top, left = draw(image.shape[1] - side + 1), draw(image.shape[2] - side + 1)
        crop = image[None, :, top : top + side, left : left + side].float()
        view = functional.interpolate(
            crop, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True
        )
        found.append(view.flip(3) if draw(2) else view)
    return torch.cat(found).clamp(0, 255)


def recalibrated(model: nn.Module, views: Views) -> nn.Module:
    """A copy whose batch norm statistics are those of the views; nothing is trained."""
    result = copy.deepcopy(model)
    calibrate(result, {"views": views.batches(CALIBRATION)})
    return result.eval()


def tuned(model: nn.Module, original: nn.Module, views: Views, steps: int, name: str) -> nn.Module:
    """A copy trained for the original's logits, by mean squared error, in bfloat16.

    Args:
        model: the smaller network.
        original: the teacher, in eval mode.
        views: what both see.
        steps: of 32 images each; Adam, one cycle of the learning rate.
        name: for the progress bar.
    """
    student = recalibrated(model, views).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=WARM_UP
    )
    with progress_bar(steps, 0, shown=True) as bar:
        for images in views.batches(steps):
            x = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    wanted = original(x).float()
                difference = student(x).float() - wanted
            loss = difference.square().mean() / wanted.var()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.advance(f"{name}: loss {loss.item():.3f}")
    return student.eval()
