"""The layer that makes one prediction of what the chosen branches saw."""

import math

import torch
from torch import Tensor, nn

from pyeff.ops.combine import combine
from pyeff.ops.top_k_routes import Routes


class Combiner(nn.Module):
    """A projection for every branch, added up over the chosen ones.

    ``logits[n] = bias + sum_j routes.weight[n, j] * weight[b] @ y[n, j]`` with
    ``b = routes.index[n, j]``: one linear layer over the features of all branches side by side,
    those that did not run being zero; and initialised like that one.

    Args:
        features: features F that a branch emits.
        classes: outputs O.
        n: number of branches B.
        bias: whether the sum has a bias.

    Raises:
        ValueError: a size that is not positive.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, section 3.

    Example:
        >>> combiner = Combiner(6, 10, n=5)
        >>> routes = pyeff.ops.top_k_routes(torch.randn(2, 5), k=3)
        >>> combiner(torch.randn(2, 3, 6), routes).shape
        torch.Size([2, 10])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        classes: int,
        n: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(features, classes, n) < 1:
            raise ValueError(
                "Combiner: features, classes and n must be positive, "
                f"got {features}, {classes} and {n}"
            )
        self.features, self.classes, self.branches = features, classes, n
        self.weight = nn.Parameter(torch.empty(n, classes, features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(classes, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections as ``nn.Linear(B * F, O)`` draws its weight."""
        bound = 1 / math.sqrt(self.branches * self.features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, y: Tensor, routes: Routes) -> Tensor:
        """Adds up the projections of the branches that ran.

        Args:
            y: what they emitted, ``[N, k, F]``.
            routes: which branches these are, and their weights.

        Returns:
            Logits ``[N, O]``.
        """
        return combine(y, self.weight, self.bias, routes)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.features}, {self.classes}, n={self.branches}, bias={self.bias is not None}"
