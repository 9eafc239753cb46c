"""What a HydraNet's gate does: right choices, use of the branches, accuracy by branch and class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyeff.models.hydranet import HydraNet
from pyeff.train.processes import Processes

# Below these the branches are no longer used as branches, whatever the accuracy says.
COLLAPSED_ENTROPY = 0.75
DEAD_SHARE = 0.05


@dataclass(frozen=True)
class GateSummary:
    """Counts over some images, as shares.

    Attributes:
        images: how many were seen.
        accuracy: share of right classes.
        top1: share of images whose class's own branch has the highest score; ``None`` where no
            branch owns a class (a gate that is not supervised).
        topk: the same among the k highest.
        use: for every branch its share of all (image, branch) pairs; sums to 1.
        entropy: of ``use``, over its largest value log n_b: 1 is even use, 0 a single branch.
        dead: branches used less than a twentieth as often as under even use.
        branch_accuracy: for every branch the share of right classes among the images that ran it;
            ``None`` where none did.
        class_accuracy: for every class its share of right answers; ``None`` without an image.
        serves: ``[classes][n_b]``: share of a class's images that ran the branch.
    """

    images: int
    accuracy: float
    top1: float | None
    topk: float | None
    use: Sequence[float]
    entropy: float
    dead: Sequence[int]
    branch_accuracy: Sequence[float | None]
    class_accuracy: Sequence[float | None]
    serves: Sequence[Sequence[float]]

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """The summary as a JSON-able document; without ``serves`` if it shall be short."""
        document = asdict(self)
        if not whole:
            del document["serves"]
        return document

    def collapse(self) -> str | None:
        """What is wrong with the use of the branches, in words; ``None`` if nothing is.

        Even use is what a gate of evenly filled groups shows; an entropy below 0.75 of log n_b, or
        a branch that is dead, is not a matter of noise.

        Source: Mullapudi et al., "HydraNets", CVPR 2018, on the gate learned from the task loss
            (the ablation LEARN), which collapses.
        """
        trouble = []
        if self.entropy < COLLAPSED_ENTROPY:
            trouble.append(
                f"the entropy of its use is {self.entropy:.2f} of log n_b, below "
                f"{COLLAPSED_ENTROPY:.2f}"
            )
        if self.dead:
            trouble.append(
                f"{len(self.dead)} of {len(self.use)} branches get less than "
                f"{DEAD_SHARE:.0%} of even use ({', '.join(map(str, self.dead[:8]))}"
                f"{', ...' if len(self.dead) > 8 else ''})"
            )
        return "the gate collapses: " + "; ".join(trouble) if trouble else None


class GateStatistics:
    """Counts to be filled batch by batch, summed over processes, kept in a checkpoint.

    Args:
        classes: number of classes.
        n_b: number of branches.
        device: where the counts are.

    Attributes:
        counts: float64, by name: ``used`` and ``right`` ``[classes, n_b]``, images of a class that
            ran a branch, and those of them that were classified rightly; ``seen``
            ``[classes, 2]``, images of a class and the right ones of them; ``gate`` ``[3]``, images
            with a label for the gate, their right first branch, their right k.
    """

    def __init__(self, classes: int, n_b: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.counts = {
            "used": zeros(classes, n_b),
            "right": zeros(classes, n_b),
            "seen": zeros(classes, 2),
            "gate": zeros(3),
        }

    @torch.no_grad()
    def add(
        self,
        logits: Tensor,
        scores: Tensor,
        index: Tensor,
        labels: Tensor,
        groups: Tensor | None,
    ) -> None:
        """Counts a batch.

        Args:
            logits: ``[N, classes]``.
            scores: of the gate, ``[N, n_b]``.
            index: branches that ran, ``[N, k]``.
            labels: int64 ``[N]``.
            groups: the branch that owns each image's class, int64 ``[N]``; ``None`` where classes
                have no owner.
        """
        classes = len(self.counts["used"])
        # As products of matrices: exact in float64, and deterministic on every device.
        of_class = functional.one_hot(labels, classes).double().t()  # [classes, N]
        ran = torch.zeros_like(scores, dtype=torch.float64).scatter_(1, index.long(), 1.0)
        right = (logits.argmax(dim=1) == labels).double().unsqueeze(1)  # [N, 1]
        self.counts["used"] += of_class @ ran
        self.counts["right"] += of_class @ (ran * right)
        self.counts["seen"] += of_class @ torch.cat([torch.ones_like(right), right], dim=1)
        if groups is not None:
            ahead = branches_ahead(scores, groups)
            hits = [torch.ones_like(ahead), ahead < 1, ahead < index.shape[1]]
            self.counts["gate"] += torch.stack([hit.double().sum() for hit in hits])

    def gather(self, processes: Processes) -> None:
        """Adds up the counts of all processes; every process has the sums then."""
        self.counts = {name: processes.sum(count) for name, count in self.counts.items()}

    def clear(self) -> None:
        """Sets all counts to zero."""
        for count in self.counts.values():
            count.zero_()

    def load(self, counts: Mapping[str, Tensor]) -> None:
        """Takes over counts that were kept, such as those of a checkpoint."""
        for name, count in self.counts.items():
            count.copy_(counts[name])

    def summary(self) -> GateSummary:
        """The counts as shares."""
        counts = {name: count.cpu() for name, count in self.counts.items()}
        used, right, seen = counts["used"], counts["right"], counts["seen"]
        labelled, first, among = counts["gate"].tolist()
        pairs = used.sum(dim=0)
        use = pairs / pairs.sum().clamp_min(1)
        images = seen[:, 0].sum()
        even = 1 / len(use)
        return GateSummary(
            images=int(images),
            accuracy=float(seen[:, 1].sum() / images.clamp_min(1)),
            top1=first / labelled if labelled else None,
            topk=among / labelled if labelled else None,
            use=use.tolist(),
            entropy=use_entropy(use),
            dead=(use < DEAD_SHARE * even).nonzero().flatten().tolist(),
            branch_accuracy=_shares(right.sum(dim=0), pairs),
            class_accuracy=_shares(seen[:, 1], seen[:, 0]),
            serves=(used / seen[:, :1].clamp_min(1)).tolist(),
        )


def statistics_of(model: HydraNet) -> GateStatistics:
    """Empty counts for a network, where it is."""
    return GateStatistics(model.classes, model.n_b, model.class_group.device)


def branches_ahead(scores: Tensor, groups: Tensor) -> Tensor:
    """How many branches a gate puts before the right one.

    Args:
        scores: ``[N, n_b]``.
        groups: the right branch of each image, int64 ``[N]``.

    Returns:
        int64 ``[N]``; equal scores go to the lower index, as in :func:`pyeff.ops.top_k_routes`.
    """
    own = scores.gather(1, groups.unsqueeze(1))
    lower = torch.arange(scores.shape[1], device=scores.device) < groups.unsqueeze(1)
    return ((scores > own) | ((scores == own) & lower)).sum(dim=1)


def use_entropy(use: Tensor) -> float:
    """Entropy of the shares ``[n_b]`` over log n_b; 1 for a single branch, which is even use."""
    if len(use) == 1:
        return 1.0
    return float(torch.special.entr(use).sum() / math.log(len(use)))


def _shares(part: Tensor, whole: Tensor) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]
