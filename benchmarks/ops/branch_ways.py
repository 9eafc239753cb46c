"""Every way that we know to run k of B branches per image in PyTorch, as bench_branch_conv2d needs.

A branch is a list of layers over slots; slot 0 is its input, slot i + 1 the result of layer i. A
way is given the images [N, C, H, W] and an index [N, k] at every call, and returns [N * k, ...].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor], Tensor]
Conv = Callable[[Tensor, int, Tensor | None], Tensor]  # input, number of the layer, residual


@dataclass(frozen=True)
class Layer:
    """A convolution with folded norm, the residual that is added to it, and a ReLU or none."""

    source: int
    weight: Tensor  # [B, O, C, kernel, kernel]
    bias: Tensor  # [B, O]
    stride: int = 1
    residual: int = -1
    relu: bool = True

    @property
    def padding(self) -> int:
        """Half of the kernel."""
        return self.weight.shape[-1] // 2


def run_layers(x: Tensor, layers: Sequence[Layer], conv: Conv) -> Tensor:
    """The branch with its convolutions done by ``conv``."""
    slots = [x]
    for i, layer in enumerate(layers):
        residual = slots[layer.residual] if layer.residual >= 0 else None
        slots.append(conv(slots[layer.source], i, residual))
    return slots[-1]


def finish(y: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """Residual and ReLU, in place."""
    if residual is not None:
        y += residual
    return y.relu_() if layer.relu else y


# --- loops ----------------------------------------------------------------------------------------


def loop_over_branches(branches: int, run: Callable[[Tensor, int], Tensor]) -> Run:
    """Images sorted by branch, one call of ``run`` for each branch that was chosen, sorted back."""

    def call(x: Tensor, index: Tensor) -> Tensor:
        flat = index.flatten()
        order = flat.argsort()
        counts = flat.bincount(minlength=branches).tolist()
        parts = x.index_select(0, order // index.shape[1]).split(counts)
        results = [run(part, b) for b, part in enumerate(parts) if part.shape[0] > 0]
        y = torch.cat(results)
        return torch.empty_like(y).index_copy_(0, order, y)

    return call


def plain_convs(layers: Sequence[Layer], memory_format: torch.memory_format) -> list[Conv]:
    """F.conv2d, one Conv for each branch, with weights in ``memory_format``."""
    branches = layers[0].weight.shape[0]
    weights = [
        [layer.weight[b].contiguous(memory_format=memory_format) for layer in layers]
        for b in range(branches)
    ]
    biases = [[layer.bias[b].clone() for layer in layers] for b in range(branches)]

    def conv_of(b: int) -> Conv:
        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            layer = layers[i]
            y = F.conv2d(x, weights[b][i], biases[b][i], layer.stride, layer.padding)
            return finish(y, layer, residual)

        return conv

    return [conv_of(b) for b in range(branches)]


def loop(layers: Sequence[Layer], memory_format: torch.memory_format) -> Run:
    """A Python loop over branches."""
    convs = plain_convs(layers, memory_format)

    def run(x: Tensor, b: int) -> Tensor:
        return run_layers(x.contiguous(memory_format=memory_format), layers, convs[b])

    return loop_over_branches(len(convs), run)


def loop_over_images(layers: Sequence[Layer]) -> Run:
    """A Python loop over images and their branches."""
    convs = plain_convs(layers, torch.channels_last)

    def call(x: Tensor, index: Tensor) -> Tensor:
        return torch.cat(
            [
                run_layers(x[n : n + 1], layers, convs[b])
                for n, row in enumerate(index.tolist())
                for b in row
            ]
        )

    return call


def loop_prepacked(layers: Sequence[Layer], sizes: Sequence[Sequence[int]]) -> Run:
    """A loop over branches with oneDNN's packed weights and its fused additions and ReLUs.

    ``sizes`` are those of an average input of each layer.
    """
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    ops = torch.ops.mkldnn
    branches = layers[0].weight.shape[0]

    def window(layer: Layer) -> tuple[list[int], list[int], list[int], int]:
        return [layer.padding] * 2, [layer.stride] * 2, [1, 1], 1

    packed = [
        [
            reorder(layer.weight[b].to_mkldnn(), *window(layer), list(size))
            for layer, size in zip(layers, sizes, strict=True)
        ]
        for b in range(branches)
    ]
    biases = [[layer.bias[b].clone() for layer in layers] for b in range(branches)]

    def run(x: Tensor, b: int) -> Tensor:
        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            layer = layers[i]
            relu = "relu" if layer.relu else None
            arguments = (packed[b][i], biases[b][i], *window(layer))
            if residual is None:
                y = ops._convolution_pointwise(x, *arguments, relu or "none", [], "")
            else:
                y = ops._convolution_pointwise.binary(
                    x, residual, *arguments, "add", None, relu, [], None
                )
            result: Tensor = y
            return result

        return run_layers(x, layers, conv)

    return loop_over_branches(branches, run)


def loop_compiled(layers: Sequence[Layer]) -> Run:
    """A loop over branches that calls one branch compiled by Inductor for any batch."""
    branches = layers[0].weight.shape[0]
    parameters = [
        [
            t
            for layer in layers
            for t in (
                layer.weight[b].contiguous(memory_format=torch.channels_last),
                layer.bias[b].clone(),
            )
        ]
        for b in range(branches)
    ]

    def branch(x: Tensor, own: list[Tensor]) -> Tensor:
        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            layer = layers[i]
            y = F.conv2d(x, own[2 * i], own[2 * i + 1], layer.stride, layer.padding)
            y = y if residual is None else y + residual
            return y.relu() if layer.relu else y

        return run_layers(x, layers, conv)

    compiled = torch.compile(branch, dynamic=True)
    return loop_over_branches(branches, lambda x, b: compiled(x, parameters[b]))


# --- all at once ----------------------------------------------------------------------------------


def gathered(layers: Sequence[Layer]) -> Run:
    """The chosen weights gathered, then one convolution with a group for every pair."""

    def call(x: Tensor, index: Tensor) -> Tensor:
        n, k = index.shape
        chosen = index.flatten().long()

        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            layer = layers[i]
            weight, bias = layer.weight[chosen].flatten(0, 1), layer.bias[chosen].flatten()
            y = F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=n * k)
            return finish(y, layer, residual)

        pairs = x.unsqueeze(1).expand(-1, k, -1, -1, -1).reshape(1, -1, *x.shape[2:])
        y = run_layers(pairs, layers, conv)
        return y.reshape(n * k, -1, *y.shape[2:])

    return call


def padded(layers: Sequence[Layer]) -> Run:
    """Every branch gets as many images as the busiest, then one convolution with B groups.

    What torch.vmap over the branches makes of it, too.
    """
    branches = layers[0].weight.shape[0]
    weights = [layer.weight.flatten(0, 1) for layer in layers]
    biases = [layer.bias.flatten() for layer in layers]

    def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
        layer = layers[i]
        y = F.conv2d(x, weights[i], biases[i], layer.stride, layer.padding, groups=branches)
        return finish(y, layer, residual)

    def call(x: Tensor, index: Tensor) -> Tensor:
        flat = index.flatten().long()
        order = flat.argsort()
        counts = flat.bincount(minlength=branches)
        room = int(counts.max())
        first = counts.cumsum(0) - counts
        place = torch.empty_like(flat)  # of every pair among those of its branch
        place[order] = torch.arange(flat.numel()) - first[flat[order]]
        seats = x.new_zeros(room, branches, *x.shape[1:])
        seats[place, flat] = x.repeat_interleave(index.shape[1], 0)
        y = run_layers(seats.flatten(1, 2), layers, conv)
        return y.unflatten(1, (branches, -1))[place, flat]

    return call


def dense(layers: Sequence[Layer]) -> Run:
    """All branches of all images; what was not chosen is thrown away."""
    branches = layers[0].weight.shape[0]
    weights = [layer.weight.flatten(0, 1) for layer in layers]
    biases = [layer.bias.flatten() for layer in layers]

    def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
        layer = layers[i]
        groups = 1 if layer.source == 0 else branches  # all branches read the same image
        y = F.conv2d(x, weights[i], biases[i], layer.stride, layer.padding, groups=groups)
        return finish(y, layer, residual)

    def call(x: Tensor, index: Tensor) -> Tensor:
        y = run_layers(x, layers, conv).unflatten(1, (branches, -1))
        rows = torch.arange(x.shape[0]).repeat_interleave(index.shape[1])
        return y[rows, index.flatten().long()]

    return call


# --- matrix products ------------------------------------------------------------------------------


def columns(x: Tensor, layer: Layer) -> tuple[Tensor, tuple[int, int]]:
    """[M, L, C * kernel * kernel] of the windows that L output pixels read, and their (H, W)."""
    kernel, stride, padding = layer.weight.shape[-1], layer.stride, layer.padding
    height, width = ((s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:])
    if kernel == 1:
        rows = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
    else:
        rows = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
    return rows.reshape(x.shape[0], height * width, -1), (height, width)


def im2col_bmm(layers: Sequence[Layer]) -> Run:
    """Windows and chosen weights gathered, then one batched matrix product."""
    flat = [layer.weight.flatten(2).transpose(1, 2).contiguous() for layer in layers]

    def call(x: Tensor, index: Tensor) -> Tensor:
        chosen = index.flatten().long()

        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            rows, size = columns(x, layers[i])
            y = torch.baddbmm(layers[i].bias[chosen].unsqueeze(1), rows, flat[i][chosen])
            y = y.unflatten(1, size).permute(0, 3, 1, 2)
            return finish(y, layers[i], residual)

        return run_layers(x.repeat_interleave(index.shape[1], 0), layers, conv)

    return call


def grouped_mm(layers: Sequence[Layer]) -> Run:
    """Windows sorted by branch, then torch's grouped matrix product."""
    product: Any = torch._grouped_mm
    branches = layers[0].weight.shape[0]
    flat = [layer.weight.flatten(2).transpose(1, 2).contiguous() for layer in layers]

    def call(x: Tensor, index: Tensor) -> Tensor:
        chosen = index.flatten().long()
        order = chosen.argsort()
        ordered = chosen[order]
        ends = chosen.bincount(minlength=branches).cumsum(0)

        def conv(x: Tensor, i: int, residual: Tensor | None) -> Tensor:
            rows, size = columns(x, layers[i])
            pixels = size[0] * size[1]
            y = product(rows.flatten(0, 1), flat[i], offs=(ends * pixels).int())
            y = y.unflatten(0, (-1, pixels)) + layers[i].bias[ordered].unsqueeze(1)
            y = y.unflatten(1, size).permute(0, 3, 1, 2)
            return finish(y, layers[i], residual)

        y = run_layers(x.index_select(0, order // index.shape[1]), layers, conv)
        return torch.empty_like(y).index_copy_(0, order, y)

    return call
