"""torch-pruning's dependency graph of a network, with what it needs to be told about it."""

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyeff._extras import require
from pyeff.nn.folding import layers_apart

OP = "channel_groups"
_TOLD = ("_ElementWiseOp", "_ConcatOp")


class Entry(nn.Module):
    """Stands before the network, so that the dependency graph knows the channels of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, with a node of their own in autograd's graph."""
        return x * 1


class _Traced(nn.Module):
    """The network behind an entry for every input of floating point."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.model = model
        self.entries = nn.ModuleList(
            Entry(x.shape[1]) if _has_channels(x) else nn.Identity() for x in inputs
        )

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*[entry(x) for entry, x in zip(self.entries, inputs, strict=True)])


def _has_channels(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() > 1


@contextlib.contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode with every layer run as a call of its own, and the modes put back after.

    Nothing is done in place either: on a view (an instance norm's result) that would give the layer
    before it another node in autograd's graph than the one that its hooks saw.
    """
    modes = {module: module.training for module in model.modules()}
    in_place: list[Any] = [m for m in modes if getattr(m, "inplace", None) is True]
    model.eval()
    for module in in_place:
        module.inplace = False
    try:
        with layers_apart():
            yield
    finally:
        for module in in_place:
            module.inplace = True
        for module, training in modes.items():
            module.training = training


def dependency_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, list[Any]]:
    """torch-pruning's graph of a network, and autograd's nodes of its outputs.

    Args:
        model: in eval mode, its layers run apart: see :func:`quiet_eval`.
        inputs: of one forward pass.

    Raises:
        ValueError: the network cannot be traced.
        ImportError: torch-pruning is missing.
    """
    pruning = require("torch_pruning", "compress", "to find the channels that are tied")

    ends: list[Any] = []

    def outputs_of(out: Any) -> list[Tensor]:
        # Auxiliary heads that are off, sizes and classes come along with what channels lead to.
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        recorded = [tensor for tensor in tensors if tensor.grad_fn is not None]
        ends.extend(tensor.grad_fn for tensor in recorded)
        return recorded

    # Inputs that need a gradient put everything into autograd's graph, frozen layers too.
    leaves = tuple(
        x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs
    )
    traced = _Traced(model, inputs)
    traced.train(model.training)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = _Shapes()
            graph = _graph_class(pruning, shapes)().build_dependency(
                traced,
                leaves,
                forward_fn=shapes.of,
                output_transform=outputs_of,
                customized_pruners={Entry: _entry_pruner(pruning)},
                verbose=False,
            )
    except Exception as error:
        # torch-pruning raises whatever its walk stumbles over.
        raise ValueError(
            f"{OP}: model must be one that can be traced with the example, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not ends:
        raise ValueError(
            f"{OP}: model must give tensors that autograd recorded, got outputs without a graph"
        )
    return graph, ends


class _Shapes(TorchFunctionMode):
    """How many channels the results of a forward pass have, by autograd's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[Any, int] = {}

    def of(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Runs a network and remembers."""
        with self:
            return net(*inputs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Of other numbers of dimensions it is not known which one counts the channels.
        if isinstance(out, Tensor) and out.dim() in (2, 4) and out.grad_fn is not None:
            self.channels[out.grad_fn] = out.shape[1]
        return out


def _graph_class(pruning: ModuleType, shapes: _Shapes) -> Any:
    """torch-pruning's graph, with what it takes for granted about splits and views put right.

    What it has to infer, and may fail to, it is told: the channels of sums and concatenations.
    """

    def trace(self: Any, *args: Any, **options: Any) -> Any:
        nodes = pruning.DependencyGraph._trace(self, *args, **options)
        for node in nodes.values():
            kind = type(node.module).__name__
            if kind == "_SplitOp":
                _order_parts(node)
            elif kind == "_ReshapeOp" and _keeps_a_map(node):
                node.type = pruning.ops.OPTYPE.ELEMENTWISE
        return nodes

    infer_shapes = pruning.dependency.shape_infer

    def told(infer: Any, walk: Any) -> Any:
        def channels(self: Any, at: Any) -> Any:
            found = infer(self, at)
            node = at if hasattr(at, "grad_fn") else self.module2node.get(at)
            if found is not None or type(node.module).__name__ not in _TOLD or self.walks:
                return found
            # Neighbours know better: shapes do not say which dimension counts the channels.
            self.walks = True
            try:
                known = walk(self, node, [0])
            finally:
                self.walks = False
            return shapes.channels.get(node.grad_fn) if known is None else known

        return channels

    base = pruning.DependencyGraph
    methods = {
        "_trace": trace,
        "walks": False,
        "get_out_channels": told(
            base.get_out_channels, infer_shapes.infer_out_channels_recursively
        ),
        "get_in_channels": told(base.get_in_channels, infer_shapes.infer_in_channels_recursively),
    }
    return type("Graph", (base,), methods)


def _order_parts(node: Any) -> None:
    """Sorts what reads the parts of a split by part; torch-pruning has them as it met them."""
    readers = [
        (part, at, reader)
        for at, reader in enumerate(dict.fromkeys(node.outputs))
        for function, part in reader.grad_fn.next_functions
        if function == node.grad_fn
    ]
    if len(readers) == len(node.outputs):
        node.outputs = [reader for _, _, reader in sorted(readers, key=lambda r: r[:2])]


def _keeps_a_map(node: Any) -> bool:
    """Whether a view is of a map that convolutions read after it: no flatten before a linear layer.

    torch-pruning takes every view for a flatten and fails where the numbers do not fit.
    """
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    if len(sizes) < 3:
        return False
    seen, ahead = set(), list(node.outputs)
    while ahead:
        reader = ahead.pop()
        if isinstance(reader.module, nn.modules.conv._ConvNd):
            return True
        if reader not in seen and not makes_channels(reader.module):
            seen.add(reader)
            ahead.extend(reader.outputs)
    return False


def _entry_pruner(pruning: ModuleType) -> Any:
    """Tells torch-pruning how many channels an entry has; an entry is never cut."""
    methods = {
        "prune_out_channels": lambda self, layer, idxs: layer,
        "prune_in_channels": lambda self, layer, idxs: layer,
        "get_out_channels": lambda self, layer: layer.channels,
        "get_in_channels": lambda self, layer: layer.channels,
    }
    return type("EntryPruner", (pruning.pruner.function.BasePruningFunc,), methods)()


def makes_channels(module: Any) -> bool:
    """Whether a module has filters."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
