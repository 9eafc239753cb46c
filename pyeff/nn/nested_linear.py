"""A linear layer of which any interval of features can run."""

import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.units import Range


class NestedLinear(nn.Linear):
    """``nn.Linear`` whose forward takes the features that are active.

    ``forward(x, in_range, out_range)`` equals ``linear(x, weight[o0:o1, i0:i1], bias[o0:o1])``.
    A matrix product reads a strided slice as it is, so nothing is copied. Parameters and state
    dict are those of ``nn.Linear``.

    Example:
        >>> import torch
        >>> NestedLinear(8, 3)(torch.randn(2, 4), in_range=(2, 6)).shape
        torch.Size([2, 3])
    """

    def forward(
        self, x: Tensor, in_range: Range | None = None, out_range: Range | None = None
    ) -> Tensor:
        """Multiplies by the active part of the weight.

        Args:
            x: ``[..., I']``, exactly the features of ``in_range``.
            in_range: input features [lo, hi) of the full layer; ``None`` for all.
            out_range: output features [lo, hi); ``None`` for all.

        Returns:
            ``[..., O']``.

        Raises:
            ValueError: a range outside the layer.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if out_range is not None:
            low, high = _checked(out_range, self.out_features, "out_range")
            weight = weight[low:high]
            bias = None if bias is None else bias[low:high]
        if in_range is not None:
            low, high = _checked(in_range, self.in_features, "in_range")
            weight = weight[:, low:high]
        return F.linear(x, weight, bias)


def _checked(interval: Range, size: int, name: str) -> Range:
    low, high = interval
    if isinstance(low, int) and isinstance(high, int) and not 0 <= low < high <= size:
        raise ValueError(
            f"NestedLinear: {name} must be (lo, hi) with 0 <= lo < hi <= {size}, got {interval}"
        )
    return low, high
