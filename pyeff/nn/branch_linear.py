"""Linear layers side by side, of which every image runs k."""

import math

import torch
from torch import Tensor, nn

from pyeff.ops.branch_linear import branch_linear
from pyeff.ops.top_k_routes import Routes


class BranchLinear(nn.Module):
    """B linear layers of one shape; every image runs those that its routes name.

    Row (n, j) of the result is ``linear(x[n], weight[b], bias[b])`` with
    ``b = routes.index[n, j]``. The weights lie in one tensor ``[B, O, I]``; each branch is
    initialised as an ``nn.Linear``, with its own draw.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        branches: number of branches B.

    Raises:
        ValueError: a number of branches or features that is not positive.

    Example:
        >>> linear = BranchLinear(6, 4, branches=5)
        >>> routes = pyeff.ops.top_k_routes(torch.randn(2, 5), k=3)
        >>> linear(torch.randn(2, 6), routes).shape
        torch.Size([2, 3, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        branches: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(branches, in_features, out_features) < 1:
            raise ValueError(
                "BranchLinear: branches, in_features and out_features must be positive, "
                f"got {branches}, {in_features} and {out_features}"
            )
        self.in_features, self.out_features, self.branches = in_features, out_features, branches
        shape = (branches, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(
                torch.empty(branches, out_features, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every branch as ``nn.Linear`` draws its parameters."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, routes: Routes | Tensor) -> Tensor:
        """Maps every image's features with the branches that it is routed to.

        Args:
            x: ``[N, I]``, or one row for every pair, ``[N, k, I]``.
            routes: which branches: ``Routes``, or their index ``[N, k]``.

        Returns:
            ``[N, k, O]``.
        """
        return branch_linear(x, self.weight, self.bias, routes)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"branches={self.branches}"
        )
