"""The layer that chooses k of n branches for every image."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyeff.ops.top_k_routes import Routes, top_k_routes

MODES = ("supervised", "noisy_topk", "learn")


class GateOutput(NamedTuple):
    """What a gate decides.

    Attributes:
        scores: ``[N, B]``, before any noise.
        routes: the chosen branches.
        auxiliary: 0-d; the noisy gate's balance losses, zero otherwise.
    """

    scores: Tensor
    routes: Routes
    auxiliary: Tensor


class TopKGate(nn.Module):
    """Scores B branches by a linear layer and keeps the k best of each image.

    Modes:

    - ``"supervised"`` (HydraNet): binary weights, so no task loss reaches the gate; it is trained
      by the cross entropy of ``scores`` against the group labels of the images.
    - ``"noisy_topk"``: noise of a learned size is added to the scores in training, the chosen
      branches are weighted by a softmax over the kept scores, and two losses (importance and
      load, each a weight times the squared coefficient of variation over the branches) balance
      their use. Both matrices start at zero, so that all branches start equal.
    - ``"learn"``: weights by a softmax over the kept scores, trained by the task loss alone; the
      ablation that collapses.

    Args:
        features: features F of the images.
        n: number of branches B.
        mode: as above.
        importance, load: weights of the two balance losses.

    Raises:
        ValueError: an unknown mode, a size that is not positive, a negative loss weight.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, section 3; Shazeer et al., "Outrageously
    Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017, section 2.1
    and appendix A, for ``"noisy_topk"``.

    Example:
        >>> gate = TopKGate(6, 5)
        >>> scores, routes, auxiliary = gate(torch.randn(2, 6), k=3)
        >>> scores.shape, routes.index.shape
        (torch.Size([2, 5]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        features: int,
        n: int,
        mode: str = "supervised",
        *,
        importance: float = 0.01,
        load: float = 0.01,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"TopKGate: mode must be one of {MODES}, got {mode!r}")
        if min(features, n) < 1:
            raise ValueError(f"TopKGate: features and n must be positive, got {features} and {n}")
        if min(importance, load) < 0:
            raise ValueError(
                f"TopKGate: importance and load must not be negative, got {importance} and {load}"
            )
        self.features, self.branches, self.mode = features, n, mode
        self.importance, self.load = importance, load
        self.score = nn.Linear(features, n, bias=mode != "noisy_topk")
        self.noise = nn.Linear(features, n, bias=False) if mode == "noisy_topk" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the scores' matrix as ``nn.Linear`` does; zeros for the noisy gate."""
        self.score.reset_parameters()
        if self.noise is not None:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, k: int, groups: Tensor | None = None) -> GateOutput:
        """Chooses k branches for every image.

        Args:
            x: features ``[N, F]``.
            k: how many, 1 to B.
            groups: ``[N]`` int64, a branch of every image that has to be among the chosen, in the
                first place (teacher forcing); ``None`` to leave the choice to the scores.

        Returns:
            Scores, routes (by falling score) and the balance loss, which is zero in eval mode.

        Raises:
            ValueError: k or a group out of range (groups are checked on the CPU), groups that are
                not one integer for each image, scores that are NaN (on the CPU).
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"TopKGate: x must be [N, {self.features}], got {list(x.shape)}")
        if not 1 <= k <= self.branches:
            raise ValueError(f"TopKGate: k must be in 1..{self.branches}, got {k}")
        scores = self.score(x)
        noisy, spread = scores, None
        if self.noise is not None and self.training:
            # Never zero: a quotient by it follows.
            tiny = torch.finfo(scores.dtype).tiny
            spread = nn.functional.softplus(self.noise(x)).clamp_min(tiny)
            noisy = scores + torch.randn_like(scores) * spread
        routes = self._choose(noisy, k, groups)
        if spread is None:
            return GateOutput(scores, routes, scores.new_zeros(()))
        auxiliary = self._balance(scores, noisy, spread, routes)
        return GateOutput(scores, routes, auxiliary)

    def _choose(self, scores: Tensor, k: int, groups: Tensor | None) -> Routes:
        weights: Literal["binary", "softmax"]
        weights = "binary" if self.mode == "supervised" else "softmax"
        if groups is None:
            return top_k_routes(scores, k, weights=weights)
        self._check_groups(groups, len(scores))
        forced = scores.detach().scatter(1, groups.unsqueeze(1), float("inf"))
        index, weight = top_k_routes(forced, k)
        if weights == "softmax":
            weight = scores.gather(1, index.long()).softmax(1)
        return Routes(index, weight)

    def _check_groups(self, groups: Tensor, images: int) -> None:
        if groups.shape != (images,) or groups.dtype != torch.int64:
            raise ValueError(
                f"TopKGate: groups must be int64 [{images}], one for each image, got "
                f"{groups.dtype} of shape {list(groups.shape)}"
            )
        if groups.is_cpu and groups.numel() and not torch.compiler.is_compiling():
            low, high = groups.aminmax()
            if low < 0 or high >= self.branches:
                raise ValueError(
                    f"TopKGate: groups must be in 0..{self.branches - 1}, got "
                    f"{int(low if low < 0 else high)}"
                )

    def _balance(self, scores: Tensor, noisy: Tensor, spread: Tensor, routes: Routes) -> Tensor:
        """w_importance CV(importance)^2 + w_load CV(load)^2 over the branches."""
        index = routes.index.long()
        kept = torch.zeros_like(noisy).scatter(1, index, routes.weight.to(noisy.dtype))
        loss = self.importance * squared_variation(kept.sum(0))
        k = index.shape[1]
        if k == self.branches:  # every branch always runs: the load is equal
            return loss
        top = noisy.topk(k + 1, dim=1).values
        # The k-th largest without component i: the next one where i is among the k largest.
        threshold = torch.where(noisy >= top[:, k - 1 : k], top[:, k:], top[:, k - 1 : k])
        probability = torch.special.ndtr((scores - threshold) / spread)
        return loss + self.load * squared_variation(probability.sum(0))

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.features}, {self.branches}, mode={self.mode!r}"


def squared_variation(x: Tensor) -> Tensor:
    """Squared coefficient of variation, (std / mean)^2, of ``[B]``; 0-d, zero where all are."""
    mean = x.mean()
    return x.var(correction=0) / (mean * mean).clamp_min(torch.finfo(x.dtype).tiny)
