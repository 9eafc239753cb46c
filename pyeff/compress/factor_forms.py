"""The two layers that stand in for one of low rank: which matrix is cut, what is built of it."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyeff.compress.rank_rules import noise_floor

FACTORED_KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
Factored = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a layer's weights, in float64.

    Attributes:
        form: ``"channel"`` or ``"spatial"``.
        left: ``[m, R]``, orthonormal columns.
        values: falling ``[R]``.
        right: ``[R, n]``, orthonormal rows.
        floor: singular values up to here are rounding.
    """

    form: str
    left: Tensor
    values: Tensor
    right: Tensor
    floor: float

    def error(self, rank: int) -> float:
        """Relative error of the weights at a rank, ``|W - W_r|_F / |W|_F``."""
        squares = self.values.square()
        return float((squares[rank:].sum() / squares.sum()).sqrt())


def forms_of(layer: Factored, form: str) -> tuple[str, ...]:
    """The forms to try: a layer without a k x k kernel has the channel form only."""
    has_both = isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1
    if not has_both:
        return ("channel",)
    return ("channel", "spatial") if form == "auto" else (form,)


@torch.no_grad()
def decompose(layer: Factored, form: str) -> Decomposition:
    """Decomposes a layer's weights.

    The channel form's matrix has a row for each output: ``M[o, (i, y, x)]``. The spatial form's is
    ``M[(i, y), (o, x)]``.

    Args:
        layer: an ``nn.Conv2d`` or ``nn.ConvTranspose2d`` of one group, or an ``nn.Linear``.
        form: ``"channel"`` or ``"spatial"``.

    Source: the spatial form: Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural
    Networks with Low Rank Expansions", BMVC 2014, scheme 2.
    """
    weight = layer.weight.double()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    if form == "spatial":
        weight = weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    matrix = weight.flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    shape = (matrix.shape[0], matrix.shape[1])
    floor = noise_floor(values, shape, layer.weight.dtype)
    return Decomposition(form, left, values, right, floor)


@torch.no_grad()
def pair_of(layer: Factored, cut: Decomposition, rank: int) -> nn.Sequential:
    """The two layers: the first to ``rank`` channels, without a bias; the second with the layer's.

    The singular values are shared out by their roots, so that training moves both alike.

    Args:
        layer: the one to stand in for; not changed.
        cut: its decomposition.
        rank: at least 1.

    Returns:
        Layers of the same device, dtype, memory format and mode.
    """
    root = cut.values[:rank].sqrt()
    first = root[:, None] * cut.right[:rank]  # [r, n]
    second = cut.left[:, :rank] * root  # [m, r]
    if cut.form == "spatial":
        # M = (left root) (root right): rows belong to the first layer here.
        first, second = second.T, first.T  # [r, (i, y)], [(o, x), r]
    pair = _layers(layer, cut.form, rank)
    weights = _shaped(layer, cut.form, first, second)
    for made, weight in zip(pair, weights, strict=True):
        cast(Tensor, made.weight).copy_(weight)
    last = cast(nn.Conv2d | nn.Linear, pair[1])
    if layer.bias is not None:
        cast(Tensor, last.bias).copy_(layer.bias)
    if layer.weight.dim() == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last):
        pair._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    pair.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        cast(Tensor, last.bias).requires_grad_(layer.bias.requires_grad)
    return pair.train(layer.training)


def _shaped(layer: Factored, form: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The factors ``[r, n]`` and ``[m, r]`` as weights of the two layers."""
    if isinstance(layer, nn.Linear):
        return first, second
    height, width = layer.kernel_size
    if form == "spatial":
        return (
            first.reshape(-1, layer.in_channels, height, 1),
            second.reshape(layer.out_channels, width, -1).permute(0, 2, 1)[:, :, None],
        )
    kernels = first.reshape(-1, layer.in_channels, height, width)
    if isinstance(layer, nn.ConvTranspose2d):
        kernels = kernels.transpose(0, 1)
    return kernels, second[:, :, None, None]


def _layers(layer: Factored, form: str, rank: int) -> nn.Sequential:
    """The two layers with weights of no meaning yet."""
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False, **made),
            nn.Linear(rank, layer.out_features, bias=has_bias, **made),
        )
    inputs, outputs = layer.in_channels, layer.out_channels
    if isinstance(layer, nn.ConvTranspose2d):
        kernels: nn.Module = nn.ConvTranspose2d(
            inputs,
            rank,
            cast(Any, layer.kernel_size),
            cast(Any, layer.stride),
            cast(Any, layer.padding),
            cast(Any, layer.output_padding),
            bias=False,
            dilation=cast(Any, layer.dilation),
            **made,
        )
        return nn.Sequential(kernels, nn.Conv2d(rank, outputs, 1, bias=has_bias, **made))
    made["padding_mode"] = layer.padding_mode
    if form == "channel":
        kernels = nn.Conv2d(
            inputs,
            rank,
            cast(Any, layer.kernel_size),
            cast(Any, layer.stride),
            cast(Any, layer.padding),
            cast(Any, layer.dilation),
            bias=False,
            **made,
        )
        mixed = nn.Conv2d(
            rank, outputs, 1, bias=has_bias, device=made["device"], dtype=made["dtype"]
        )
        return nn.Sequential(kernels, mixed)
    return nn.Sequential(
        nn.Conv2d(inputs, rank, **_along(layer, 0), bias=False, **made),
        nn.Conv2d(rank, outputs, **_along(layer, 1), bias=has_bias, **made),
    )


def _along(conv: nn.Conv2d, axis: int) -> dict[str, Any]:
    """A convolution's numbers on one axis (0: rows), with none on the other."""

    def on_axis(pair: tuple[int, ...], other: int) -> tuple[int, int]:
        return (pair[0], other) if axis == 0 else (other, pair[1])

    padding = conv.padding
    return {
        "kernel_size": on_axis(conv.kernel_size, 1),
        "stride": on_axis(conv.stride, 1),
        # "same" and "valid" mean the right thing for either axis.
        "padding": padding if isinstance(padding, str) else on_axis(padding, 0),
        "dilation": on_axis(conv.dilation, 1),
    }


def why_left(layer: nn.Module, shared: bool) -> str | None:
    """Why nothing can be put in a layer's place, as far as the layer itself tells.

    Args:
        layer: any layer with a weight.
        shared: whether another layer has the same weight: see :func:`shared_weights`.
    """
    if type(layer) not in FACTORED_KINDS:
        return f"a {type(layer).__name__} is none of Conv2d, ConvTranspose2d, Linear"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a hook"
    if getattr(layer, "groups", 1) != 1:
        return f"grouped ({getattr(layer, 'groups', 1)}): each group is a small matrix of its own"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which would be lost"
    return "another layer has the same weight" if shared else None


def shared_weights(model: nn.Module) -> set[str]:
    """Names of the modules whose weight another module has too, an embedding among them."""
    shared = shared_parameters(model)
    modules = (name for name, _ in model.named_modules())
    return {name for name in modules if (f"{name}.weight" if name else "weight") in shared}


def shared_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that several modules have, under every one of these."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return {name for found in names.values() if len(found) > 1 for name in found}
