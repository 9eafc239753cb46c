"""What channels without live filters still carry, and how the layers that read them take it over.

A channel whose filter is zero gives its bias; behind a batch norm and an activation it is another
number, the same for every image and every pixel. The next layer's weights on it are then worth a
bias.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyeff.compress._dependency_graph import quiet_eval
from pyeff.compress.channel_group import CONSUMER, ChannelGroup, Member
from pyeff.compress.cut_layers import channel_axis

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Carried:
    """What arrives at a layer's input, channel by channel.

    Attributes:
        value: the number, at one pixel of one image, float64 ``[C]``.
        moves: whether it depends on the image, bool ``[C]``.
        uneven: whether it depends on the pixel, bool ``[C]``.
    """

    value: Tensor
    moves: Tensor
    uneven: Tensor


class _Watch:
    """Follows one layer's inputs over several passes."""

    def __init__(self, layer: nn.Module) -> None:
        self.axis = channel_axis(layer)
        self.first: Tensor | None = None  # [C, P]
        self.apart = torch.zeros(0)  # [C], how far any other map was from the first

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().double().cpu()
        channels = x.shape[self.axis]
        if self.axis == -1:
            x = x.reshape(-1, channels, 1)
        else:
            x = x.reshape(-1, channels, x.shape[self.axis + 1 :].numel())  # [N, C, P]
        if self.first is None:
            self.first, self.apart = x[0], x.new_zeros(channels)
        same = x.shape[1:] == self.first.shape
        apart = (x - (self.first if same else self.first[:, :1])).abs()
        self.apart = torch.maximum(self.apart, apart.nan_to_num(torch.inf).amax((0, 2)))

    def seen(self, precision: float) -> Carried:
        """What was found; numbers nearer to each other than rounding count as one."""
        if self.first is None:
            raise ValueError("carried_by: layer must have been run, got no call")
        value = self.first[:, 0]
        allowed = precision * (1 + value.abs())
        spread = (self.first - value[:, None]).abs().nan_to_num(torch.inf).amax(1)
        return Carried(value, self.apart > allowed, spread > allowed)


@torch.no_grad()
def carried_by(
    model: nn.Module,
    inputs: Sequence[Inputs],
    consumers: Iterable[str],
    disturbed: Mapping[str, Tensor],
) -> dict[str, Carried]:
    """What arrives at layers' inputs while other channels are disturbed.

    A channel that stays the same however strongly the live layers beside it are disturbed is
    constant by its wiring, not by the luck of the images.

    Args:
        model: the network, on its device; it is run in eval mode, its mode is kept.
        inputs: of several passes.
        consumers: names of convolutions and linear layers to follow.
        disturbed: for layers whose outputs are overwritten with noise, which channels.

    Returns:
        For each consumer that ran, what it was given.
    """
    random = torch.Generator().manual_seed(0)

    def disturb(channels: Tensor, axis: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            at = out.dim() + axis
            shape = [*out.shape[:at], len(channels), *out.shape[at + 1 :]]
            noise = torch.randn(shape, generator=random).to(out.device, out.dtype)
            noise = noise * (1 + out.std(correction=0))
            return out.index_copy(at, channels.to(out.device), noise)

        return hook

    watches: dict[str, _Watch] = {}
    handles = []
    for name, channels in disturbed.items():
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_hook(disturb(channels, channel_axis(layer))))
    for name in consumers:
        layer = model.get_submodule(name)
        watches[name] = _Watch(layer)
        handles.append(layer.register_forward_pre_hook(watches[name]))
    try:
        with quiet_eval(model):
            for given in inputs:
                model(*given)
    finally:
        for handle in handles:
            handle.remove()
    # Rounding differs from pixel to pixel where kernels treat the rest of a row by itself.
    precision = max(1e-9, 64 * torch.finfo(next(model.parameters()).dtype).eps)
    return {n: watch.seen(precision) for n, watch in watches.items() if watch.first is not None}


def norms_after(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> dict[str, str]:
    """The batch norm with running statistics that alone reads a layer's output, where there is one.

    Args:
        model: the network.
        inputs: of one pass.
        names: convolutions and linear layers.
    """
    made: dict[Any, str] = {}
    read: dict[str, tuple[Any, ...]] = {}
    calls: dict[str, int] = {}

    def note_output(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if out.grad_fn is not None:
                made[out.grad_fn] = name

        return hook

    def note_input(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            read[name] = (*read.get(name, ()), arguments[0].grad_fn)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(note_output(n)) for n in names]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(note_input(name)))
    leaves = tuple(
        x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs
    )
    try:
        with quiet_eval(model), torch.enable_grad():
            out = model(*leaves)
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(leaf.grad_fn for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    found = {}
    for norm, nodes in read.items():
        name = made.get(nodes[0]) if len(nodes) == 1 else None
        if name is not None and calls[name] == 1 and readers.get(nodes[0]) == 1:
            found[name] = norm
    return found


def _readers(ends: Iterable[Any]) -> dict[Any, int]:
    """How many nodes of autograd's graph read each node; an output of the network counts as one."""
    count: dict[Any, int] = {}
    stack = [end for end in ends if end is not None]
    for end in stack:
        count[end] = count.get(end, 0) + 1
    visited = set()
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        for follower, _ in node.next_functions:
            if follower is not None:
                count[follower] = count.get(follower, 0) + 1
                stack.append(follower)
    return count


def readers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """Layers that read the group's channels and stay; grouped ones lose whole groups with them."""
    return [
        member
        for member in group.members
        if member.role == CONSUMER and getattr(model.get_submodule(member.name), "groups", 1) == 1
    ]


def meets_border(layer: nn.Module) -> bool:
    """Whether a constant map leaves other values at the borders of a layer's output."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.transposed:
        return any(r != p for r, p in zip(reach, layer.padding, strict=True))
    if layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(reach)
    return any(p > 0 for p in layer.padding)


def has_phases(layer: nn.Module) -> bool:
    """Whether a constant map gives different values inside a layer's output too."""
    return (
        isinstance(layer, nn.modules.conv._ConvNd)
        and layer.transposed
        and any(s > 1 for s in layer.stride)
    )


@torch.no_grad()
def take_over(
    model: nn.Module, consumer: str, channels: Sequence[int], values: Tensor, norm: str | None
) -> None:
    """Moves what constant input channels contribute into a layer's bias, in place.

    Args:
        model: the network.
        consumer: a convolution of one group or a linear layer; its weights on the channels become
            zero.
        channels: its input channels.
        values: what they carry, float64 ``[len(channels)]``.
        norm: the batch norm that alone reads the layer, whose running mean takes the bias where
            the layer has none; ``None`` for none.
    """
    layer: Any = model.get_submodule(consumer)
    turned = isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed
    weight = layer.weight.transpose(0, 1) if turned else layer.weight  # [C_out, C_in, ...]
    at = torch.tensor(channels, device=weight.device)
    taps = weight[:, at].double().flatten(2).sum(2) if weight.dim() > 2 else weight[:, at].double()
    bias = taps @ values.to(weight.device)
    weight[:, at] = 0
    if not bias.any():
        return
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() + bias)
    elif norm is not None:
        mean = model.get_submodule(norm).get_buffer("running_mean")
        mean.copy_(mean.double() - bias)
    else:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
