"""Trained networks made smaller by hand, by the size of their weights alone.

What compression while training is compared with, and what shows removal and factorisation on
networks that are not trained here. :func:`pyeff.compress.zero_smallest` comes before it: which
channels go is decided as the penalty would decide.
"""

import torch
from torch import Tensor, nn

from pyeff.compress import (
    Compressed,
    Compressor,
    FactorizeReport,
    GroupSparsity,
    LowRank,
)


def compressed_to(model: nn.Module, example: Tensor, share: float) -> Compressed:
    """Removes what is zero, then factors layers until a share of the parameters is left.

    Args:
        model: with its channels zeroed; not changed.
        example: its input.
        share: of the parameters, in (0, 1).
    """
    compressor = Compressor(
        model,
        example,
        group=GroupSparsity(model, example, strength=0.0),
        rank=LowRank(model, strength=0.0),
        target_params=share,
    )
    return compressor.compress()


@torch.no_grad()
def truncate(model: nn.Module, report: FactorizeReport) -> int:
    """Lowers layers to the ranks that a factorisation kept, in place and at full size.

    Args:
        model: the network before factorisation.
        report: of it; only layers in the channel form are changed.

    Returns:
        How many layers that were.

    Raises:
        ValueError: a layer was factored in another form.
    """
    number = 0
    for layer in report.layers:
        if not layer.factored or layer.rank is None:
            continue
        if layer.form != "channel":
            raise ValueError(f"truncate: form must be channel, got {layer.form!r} ({layer.name})")
        weight = model.get_submodule(layer.name).get_parameter("weight")
        u, s, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        kept = (u[:, : layer.rank] * s[: layer.rank]) @ v[: layer.rank]
        weight.copy_(kept.reshape(weight.shape))
        number += 1
    return number


@torch.no_grad()
def settle_norms(model: nn.Module, seed: int = 0) -> None:
    """Gives the batch norms of an untrained network statistics and scales as of a trained one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high, generator=generator)
