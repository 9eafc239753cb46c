"""HydraNet: a stem, a gate that picks k of n branches for every image, and a combiner."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyeff.models.hydranet_cost import HydraCost, hydra_cost
from pyeff.models.partition import partition_classes
from pyeff.nn import Branches, Combiner, GateOutput, TopKGate
from pyeff.ops.top_k_routes import Routes

__all__ = ["HydraGate", "HydraNet", "HydraOutput", "class_groups_of", "partition_classes"]


class HydraOutput(NamedTuple):
    """What a HydraNet says about a batch.

    Attributes:
        logits: ``[N, classes]``.
        scores: the gate's, ``[N, n_b]``.
        routes: the branches that ran.
        auxiliary: 0-d; the noisy gate's balance losses, zero otherwise.
    """

    logits: Tensor
    scores: Tensor
    routes: Routes
    auxiliary: Tensor


class HydraGate(nn.Module):
    """Layers of its own on the stem's output, then the choice.

    Args:
        body: from the stem's output to features ``[N, F]``.
        top_k: the choice.
    """

    def __init__(self, body: nn.Module, top_k: TopKGate) -> None:
        super().__init__()
        self.body, self.top_k = body, top_k

    def forward(self, x: Tensor, k: int, groups: Tensor | None = None) -> GateOutput:
        """Chooses k branches for every image; see :class:`~pyeff.nn.TopKGate`."""
        return self.top_k(self.body(x), k, groups)


class HydraNet(nn.Module):
    """A network that runs k of its n branches for every image.

    The stem runs once for an image; the gate scores the branches; the k best run on the stem's
    output; the combiner adds up their projections to logits over all classes. With k = n and
    binary weights it is the dense network: the sum over all branches.

    Args:
        stem: images to maps.
        gate: maps to routes.
        branches: maps and routes to features ``[N, k, F]``.
        combiner: features and routes to logits.
        class_group: for every class, the branch that it belongs to; balanced and in order by
            default.
        k: how many branches run; :attr:`k` changes it at any time.
        in_channels: channels of the images.
        input_size: pixels, for :meth:`costs`.
        config: keyword arguments of :func:`pyeff.models.build` that rebuild the model.

    Attributes:
        class_group: buffer, int64 ``[classes]``: which branch owns a class.
        config: JSON-able.

    Raises:
        ValueError: k out of range, class groups that are not one branch for each class, a gate
            for another number of branches.

    Source: Mullapudi, Mark, Shazeer, Fatahalian, "HydraNets: Specialized Dynamic Architectures for
    Efficient Inference", CVPR 2018.
    """

    class_group: Tensor
    n_b: int
    classes: int

    def __init__(
        self,
        stem: nn.Module,
        gate: HydraGate,
        branches: Branches,
        combiner: Combiner,
        *,
        class_group: Sequence[int] | None = None,
        k: int = 1,
        in_channels: int = 3,
        input_size: int = 32,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        counts = (gate.top_k.branches, branches.branches, combiner.branches)
        if len(set(counts)) > 1:
            raise ValueError(
                "HydraNet: gate, branches and combiner must have as many branches, "
                f"got {counts[0]}, {counts[1]} and {counts[2]}"
            )
        self.stem, self.gate, self.branches, self.combiner = stem, gate, branches, combiner
        self.n_b, self.classes = branches.branches, combiner.classes
        self.in_channels, self.input_size = in_channels, input_size
        self.k = k
        self.config = dict(config or {})
        groups = class_groups_of(self.classes, self.n_b, class_group)
        self.register_buffer("class_group", torch.tensor(groups, dtype=torch.int64))

    @property
    def k(self) -> int:
        """How many branches run for an image."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        self._k = self._checked(value)

    def _checked(self, k: int) -> int:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"HydraNet: k must be an int, got {type(k).__name__}")
        if not 1 <= k <= self.n_b:
            raise ValueError(f"HydraNet: k must be in 1..{self.n_b}, got {k}")
        return k

    def forward(self, x: Tensor, k: int | None = None) -> Tensor:
        """Classifies images.

        Args:
            x: ``[N, C, H, W]``.
            k: how many branches run; :attr:`k` by default.

        Returns:
            Logits ``[N, classes]``.

        Raises:
            ValueError: images of the wrong shape, k out of range, scores that are NaN (CPU).
        """
        return self.forward_with_gate(x, k=k).logits

    def forward_with_gate(
        self, x: Tensor, groups: Tensor | None = None, k: int | None = None
    ) -> HydraOutput:
        """Classifies images and tells what the gate said, as training needs it.

        Args:
            x: ``[N, C, H, W]``.
            groups: int64 ``[N]``, branches that must be among the chosen (teacher forcing), say
                ``model.class_group[labels]``; ``None`` for the gate's free choice.
            k: as in :meth:`forward`.

        Returns:
            Logits, scores, routes and the balance loss.

        Raises:
            ValueError: as :meth:`forward`; groups out of range or not one for each image.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"HydraNet: x must be [N, {self.in_channels}, H, W], got {list(x.shape)}"
            )
        k = self.k if k is None else self._checked(k)
        x = self.stem(x)
        scores, routes, auxiliary = self.gate(x, k, groups)
        logits = self.combiner(self.branches(x, routes), routes)
        return HydraOutput(logits, scores, routes, auxiliary)

    def costs(
        self, input_size: int | tuple[int, int] | None = None, k: int | None = None
    ) -> HydraCost:
        """What one image costs, and what the network weighs.

        Args:
            input_size: pixels, or (H, W); the network's own by default.
            k: how many branches run; :attr:`k` by default.

        Returns:
            Multiply-adds at k and parameters of all branches, whole and by part.

        Raises:
            ValueError: a size that is not positive, k out of range.
        """
        size = self.input_size if input_size is None else input_size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"costs: input_size must be positive, got {input_size}")
        return hydra_cost(
            self, (self.in_channels, height, width), self.k if k is None else self._checked(k)
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"n_b={self.n_b}, k={self.k}"


def class_groups_of(
    classes: int, n_branches: int, given: Sequence[int] | Tensor | None = None
) -> list[int]:
    """For every class, its branch: the given ones, checked, or balanced and in order.

    Raises:
        ValueError: not one group for each class, or one that is not a branch.
    """
    if given is None:
        return [c * n_branches // classes for c in range(classes)]
    groups = [int(group) for group in given]
    if len(groups) != classes:
        raise ValueError(
            f"HydraNet: class_groups must be one for each of {classes} classes, got {len(groups)}"
        )
    if groups and not 0 <= min(groups) <= max(groups) < n_branches:
        raise ValueError(
            f"HydraNet: class_groups must be in 0..{n_branches - 1}, got {min(groups)} to "
            f"{max(groups)}"
        )
    return groups
