"""How a pair of convolutions is run: the one place that decides, from measured numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.ops._dispatch import winograd_allowed
from pyeff.ops._factorized_pair import FactorPair, taps_of


class Form(NamedTuple):
    """One way to run a pair."""

    name: str  # "fused" (one kernel), "two" (two with an epilogue each) or "torch"
    winograd: bool


def forward_form(
    backend: str, x: Tensor, w_first: Tensor, w_second: Tensor, pair: FactorPair
) -> Form:
    """The form of a forward call on a backend."""
    if backend == "torch":
        return Form("torch", False)
    if backend == "triton":
        from pyeff.triton_kernels.factorized_conv2d import can_fuse

        return Form("fused" if can_fuse(w_first, w_second, pair[:3], x.dtype) else "two", False)
    return Form("fused", winograd_fits(x, w_first, pair))


def backward_winograd(x: Tensor, w_first: Tensor, pair: FactorPair) -> bool:
    return winograd_fits(x, w_first, pair)


def winograd_fits(x: Tensor, w_first: Tensor, pair: FactorPair) -> bool:
    return (
        x.dtype == torch.float32
        and taps_of(w_first) == 3
        and pair.stride == 1
        and winograd_allowed()
    )
