"""From a module that one branch is to be like to the calls that run many of them."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyeff.nn.branch_batch_norm2d import BranchBatchNorm2d
from pyeff.nn.branch_conv2d import BranchConv2d
from pyeff.nn.branch_linear import BranchLinear
from pyeff.nn.pad_shortcut import pad_shortcut
from pyeff.nn.synchronise import SynchronisedBatchNorm2d

# Modules and functions below treat every row of a batch by itself, so that the N * k rows of all
# (image, branch) pairs can go through them as one batch.
PLAIN_MODULES = (
    nn.Identity,
    nn.Flatten,
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
)
JOINING = (operator.add, operator.iadd, torch.add, operator.sub, torch.sub, operator.mul, torch.mul)
ROWWISE = (
    *(F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.silu, F.hardswish, F.gelu),
    *(torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.tanh, F.pad, pad_shortcut),
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(torch.flatten, torch.mean),
)
METHODS = (
    "relu",
    "relu_",
    "sigmoid",
    "flatten",
    "mean",
    "view",
    "reshape",
    "permute",
    "contiguous",
)
SHAPES = (operator.getitem, operator.mul, operator.floordiv, getattr)
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    "relu_": "relu",
}
# What stands for the first dimension in the arguments of a reshape.
ROWS = "the number of rows"
JOINING_METHODS = {
    "add": torch.add,
    "add_": torch.add,
    "mul": torch.mul,
    "mul_": torch.mul,
    "sub": torch.sub,
}
IN_PLACE = (*OUT_OF_PLACE, "add_", "mul_")


@dataclass(frozen=True)
class Value:
    """The result of an earlier call, as an argument."""

    name: str


@dataclass(frozen=True)
class Call:
    """One call on one batch of rows.

    Attributes:
        kind: ``"layer"``: a stacked layer, called with the routes; ``"module"`` and ``"function"``:
            what treats every row by itself; ``"join"``: an addition or the like of two values;
            ``"cat"``: a concatenation; ``"shape"``: integers.
        name: of the result.
        target: the path of a layer or module, or a function, or the name of a method.
        args, kwargs: constants and :class:`Value`.
        branched: whether the result has a row for every (image, branch) pair; if not, for every
            image.
        last: names that nothing reads from here on.
    """

    kind: str
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branched: bool
    last: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """The calls of a template in order, the name of its input and of its output."""

    input: str
    calls: tuple[Call, ...]
    output: str
    branched: bool


def stacked(module: nn.Module, n: int) -> nn.Module | None:
    """The layer that holds n of ``module`` (uninitialised), or None where there is none.

    A layer without parameters stands for itself.
    """
    kind = stacked_kind(module)
    if kind != "layer":
        return module if kind == "module" else None
    if isinstance(module, nn.Conv2d):
        return BranchConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            branches=n,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
    if isinstance(module, nn.Linear):
        return BranchLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            branches=n,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
    return _stacked_norm(cast(nn.BatchNorm2d, module), n)


def _stacked_norm(module: nn.BatchNorm2d, n: int) -> BranchBatchNorm2d:
    sample = module.weight if module.affine else module.running_mean
    norm = BranchBatchNorm2d(
        module.num_features,
        n,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
        device=None if sample is None else sample.device,
        dtype=None if sample is None else sample.dtype,
    )
    if isinstance(module, SynchronisedBatchNorm2d):
        norm.synchronised, norm.process_group = True, module.process_group
    return norm


def unsupported(path: str, what: object) -> TypeError:
    """The error for a part of the template that cannot be branched."""
    where = f"{path!r}" if path else "the template itself"
    return TypeError(
        "Branches: template must be made of convolutions, batch norms, linear layers, activations "
        f"and pooling (see the documentation), got {what} at {where}"
    )


class _Wrapper(nn.Module):
    """Calls the template with the input alone, so that its other arguments keep their defaults."""

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.template = template

    def forward(self, x: Tensor) -> Tensor:
        return self.template(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return stacked_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


def stacked_kind(module: nn.Module) -> str | None:
    """``"layer"`` for what has a stacked form, ``"module"`` for what needs none, else None."""
    if type(module) in PLAIN_MODULES:
        return "module"
    if type(module) is nn.Conv2d:
        return "layer" if module.padding_mode == "zeros" else None
    known = type(module) in (nn.Linear, nn.BatchNorm2d, SynchronisedBatchNorm2d)
    return "layer" if known else None


def trace(template: nn.Module) -> Trace:
    """The calls that a template makes.

    Raises:
        TypeError: a part that cannot be branched; the message names its path and class.
    """
    root = _Wrapper(template)
    graph = _Tracer().trace(root)
    nodes = list(graph.nodes)
    builder = _Builder(dict(root.named_modules()), nodes)
    for position, node in enumerate(nodes):
        builder.add(node, position)
    return builder.trace()


def template_path(target: str) -> str:
    """A path in the template from one in the traced wrapper."""
    return target.removeprefix("template").removeprefix(".")


class _Builder:
    def __init__(self, modules: dict[str, nn.Module], nodes: list[fx.Node]) -> None:
        self.modules = modules
        self.places = {node: i for i, node in enumerate(nodes)}
        self.branched: dict[str, bool] = {}
        self.integers: set[str] = set()
        self.calls: list[Call] = []
        self.input, self.output = "", ""

    def add(self, node: fx.Node, position: int) -> None:
        if node.op == "placeholder":
            self.input, self.branched[node.name] = node.name, False
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result.name in self.integers:
                raise unsupported("", f"an output of {type(result).__name__}")
            self.output = result.name
        elif node.op == "get_attr":
            raise unsupported(template_path(str(node.target)), "a tensor that is used directly")
        else:
            self._add_call(node, position)

    def trace(self) -> Trace:
        return Trace(self.input, tuple(self.calls), self.output, self.branched[self.output])

    def _add_call(self, node: fx.Node, position: int) -> None:
        kind = self._kind(node)
        target: Any = node.target
        if node.op == "call_module":
            target = template_path(str(node.target))
        kwargs = dict(node.kwargs)
        if node.op == "call_method":
            target = JOINING_METHODS.get(str(target), target)
        if kind != "shape" and self._in_place(node):
            target, kwargs = self._out_of_place(node, target, kwargs)
        branched = kind == "layer" or any(
            self.branched.get(n.name, False) for n in node.all_input_nodes
        )
        last = tuple(
            n.name
            for n in node.all_input_nodes
            if max(self.places[user] for user in n.users) == position
        )
        if kind == "shape":
            self.integers.add(node.name)
        self.branched[node.name] = branched
        args = tuple(_constant(argument) for argument in node.args)
        if target in ("view", "reshape"):
            # Images or pairs, whatever value of the template the number was taken from; and maps
            # are channels_last here, of which there is no flat view.
            target, args = _reshaped(args)
        kwargs = {name: _constant(argument) for name, argument in kwargs.items()}
        self.calls.append(Call(kind, node.name, target, args, kwargs, branched, last))

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            kind = stacked_kind(module)
            if kind is None:
                raise unsupported(template_path(str(node.target)), type(module).__name__)
            return kind
        kind = self._kind_of_function(node)
        if kind is None:
            name = getattr(node.target, "__name__", str(node.target))
            raise unsupported(self._owner(node), f"a call of {name}")
        return kind

    def _kind_of_function(self, node: fx.Node) -> str | None:
        target, tensors = node.target, [a for a in node.all_input_nodes if not self._integer(a)]
        if node.op == "call_method":
            if target in ("size", "dim"):
                return "shape"
            if target in JOINING_METHODS:
                return "join"
            return "function" if target in METHODS and self._keeps_rows(node) else None
        if target is getattr and node.args[1] == "shape":
            return "shape"
        if target in SHAPES and not tensors:
            return "shape"
        if target is torch.cat:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return None if dim == 0 else "cat"
        if target in JOINING:
            return "join"
        return "function" if target in ROWWISE and self._keeps_rows(node) else None

    def _integer(self, node: fx.Node) -> bool:
        return node.name in self.integers

    def _keeps_rows(self, node: fx.Node) -> bool:
        """Whether a call leaves the first dimension to the batch, as far as constants tell."""
        name = getattr(node.target, "__name__", node.target)
        if name == "mean":
            dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            dims = dims if isinstance(dims, (tuple, list)) else (dims,)
            return not {0, None} & set(dims)
        if name == "flatten":
            start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
            return bool(start != 0)
        if name == "permute":
            order: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            return bool(order[0] == 0)
        return True

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.modules[str(node.target)], "inplace", False))
        return node.target in IN_PLACE or bool(node.kwargs.get("inplace", False))

    def _out_of_place(
        self, node: fx.Node, target: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The same call without a side effect, refused where that effect is used."""
        source = node.args[0]
        if isinstance(source, fx.Node) and any(
            self.places[user] > self.places[node] for user in source.users
        ):
            raise unsupported(self._owner(node), "an in-place call whose input is used again")
        if node.op != "call_module":
            target = OUT_OF_PLACE.get(target, target)
            kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
        return target, kwargs

    def _owner(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
        return template_path(paths[-1]) if paths else ""


def _constant(argument: Any) -> Any:
    """An argument of a traced call with :class:`Value` for other calls' results."""
    if isinstance(argument, fx.Node):
        return Value(argument.name)
    if isinstance(argument, (tuple, list)):
        return tuple(_constant(a) for a in argument)
    return argument


def _reshaped(args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A reshape as a call, the first size as :data:`ROWS` where it was computed."""
    shape = args[1] if isinstance(args[1], tuple) else args[1:]
    if isinstance(shape[0], Value):
        shape = (Value(ROWS), *shape[1:])
    if shape == (Value(ROWS), -1):  # which torch does not take of an empty batch
        return torch.flatten, (args[0], 1)
    return "reshape", (args[0], *shape)


def as_function(call: Call) -> Callable[..., Any]:
    """What a call without a layer does: a function, or a method as one."""
    if isinstance(call.target, str):
        name = call.target
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    function: Callable[..., Any] = call.target
    return function
