"""Batches as a function of (seed, task, step): no state, so resuming is exact and ranks agree."""

import random

import torch
from torch import Tensor
from torch.nn import functional

from pyeff.train.tasks import TaskData


def seed_of(*words: object) -> int:
    """A 63-bit seed from any words, the same in every process and version."""
    # random.Random hashes a string with SHA-512, unlike hash(), which changes by process.
    return random.Random("/".join(str(w) for w in words)).getrandbits(63)


def generator_of(*words: object) -> torch.Generator:
    """A generator on the CPU with the seed of some words."""
    return torch.Generator().manual_seed(seed_of(*words))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 ``[N, H, W, C]`` to float32 ``[N, C, H, W]`` (channels_last in memory).

    Computes ``(x / 255 - mean) / std`` per channel.

    Args:
        images: uint8 ``[N, H, W, C]``.
        mean: one a channel, in units of 0..1.
        std: one a channel, in units of 0..1.

    Returns:
        float32 ``[N, C, H, W]``, channels_last.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pads, crops at a random place and mirrors at random, all images of a batch at once.

    Args:
        images: uint8 ``[N, H, W, C]`` on the CPU.
        pad: pixels on every side.
        flip: whether half of the images are mirrored.
        generator: the only source of randomness.

    Returns:
        uint8 ``[N, H, W, C]``, a copy.
    """
    n, height, width, channels = images.shape
    top = torch.randint(0, 2 * pad + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (n, 1), generator=generator)
    mirrored = torch.randint(0, 2, (n, 1), generator=generator).bool()
    padded = functional.pad(images, (0, 0, pad, pad, pad, pad))
    rows = top + torch.arange(height)  # [N, H]
    columns = torch.arange(width).expand(n, width)
    if flip:
        columns = torch.where(mirrored, columns.flip(1), columns)
    columns = left + columns  # [N, W]
    whole_height, whole_width = height + 2 * pad, width + 2 * pad
    rows = rows + torch.arange(n).unsqueeze(1) * whole_height
    pixels = rows.unsqueeze(2) * whole_width + columns.unsqueeze(1)  # [N, H, W]
    gathered = padded.view(-1, channels).index_select(0, pixels.view(-1))
    return gathered.view(n, height, width, channels)


class SampleOrder:
    """In which order samples are drawn: permutation after permutation, laid end to end.

    Args:
        count: number of samples.
        batch_size: samples a step.
        words: what the order depends on, the run's seed among them.
    """

    def __init__(self, count: int, batch_size: int, *words: object) -> None:
        self._count, self._batch_size, self._words = count, batch_size, words
        self._rounds: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Which samples batch ``step`` holds: int64 ``[batch_size]``."""
        place, taken = step * self._batch_size, []
        wanted = self._batch_size
        while wanted:
            round_, offset = divmod(place, self._count)
            piece = self._order(round_)[offset : offset + wanted]
            taken.append(piece)
            place, wanted = place + len(piece), wanted - len(piece)
        return torch.cat(taken)

    def _order(self, round_: int) -> Tensor:
        if round_ not in self._rounds:
            order = torch.randperm(
                self._count, generator=generator_of("order", *self._words, round_)
            )
            kept = {r: o for r, o in self._rounds.items() if r == round_ - 1}
            self._rounds = {**kept, round_: order}
        return self._rounds[round_]


class BatchStream:
    """The endless row of a task's training batches; batch ``step`` depends on nothing before it.

    Images are drawn without replacement, so that a small set is simply seen more often than a large
    one. Under several ranks the whole batch is drawn alike everywhere and each rank takes its rows:
    together they have exactly the batch that one process would have.

    Args:
        task: the images.
        batch_size: images a step, over all ranks.
        seed: of the run.
        augmented: random crops and mirroring.
        rank: this process.
        ranks: number of processes; divides ``batch_size``.
    """

    def __init__(
        self,
        task: TaskData,
        batch_size: int,
        seed: int,
        *,
        augmented: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise ValueError(
                f"BatchStream: batch_size must be a multiple of the {ranks} processes, got "
                f"{batch_size}"
            )
        self._task, self._seed = task, seed
        self._augmented, self._rank, self._ranks = augmented, rank, ranks
        self._order = SampleOrder(len(task.train_labels), batch_size, seed, task.name)

    def indices(self, step: int) -> Tensor:
        """Which images batch ``step`` holds, over all ranks: int64 ``[batch_size]``."""
        return self._order.indices(step)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of batch ``step``.

        Returns:
            Images float32 ``[N, C, H, W]`` (channels_last) and labels int64 ``[N]``, on the CPU.
        """
        chosen = self.indices(step)
        images = self._task.train_images[chosen]
        if self._augmented:
            generator = generator_of("augment", self._seed, self._task.name, step)
            images = augment(images, self._task.pad, self._task.flip, generator)
        share = len(chosen) // self._ranks
        mine = slice(self._rank * share, (self._rank + 1) * share)
        return (
            normalise(images[mine], self._task.mean, self._task.std),
            self._task.train_labels[chosen[mine]],
        )
