"""n copies of any branch, of which every image runs k, in batched calls."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.nn.branch_lowering import NotInPlanError, build_plan
from pyeff.nn.branch_state import join_state, split_state, stacked_tensors
from pyeff.nn.branch_trace import (
    ROWS,
    Call,
    Trace,
    Value,
    as_function,
    stacked,
    stacked_kind,
    trace,
    unsupported,
)
from pyeff.nn.derived import DerivedValue
from pyeff.ops import BranchPlan
from pyeff.ops.branch_stage import branch_stage
from pyeff.ops.top_k_routes import Routes


class Branches(nn.Module):
    """n independently initialised copies of a module; every image runs those it is routed to.

    Row (n, j) of the result is copy ``routes.index[n, j]`` on image n. The template is traced
    once (torch.fx) and its layers are replaced by stacked ones, so the number of calls depends
    neither on the number of branches nor on that of images. It may be made of ``Conv2d`` (zero
    padding), ``BatchNorm2d``, ``Linear``, activations, pooling, ``Dropout``, additions,
    concatenations and whatever modules of these, without control flow on values.

    The state dict is that of ``nn.ModuleList`` of n copies, in both directions; the parameters
    themselves are stacked: ``[n, ...]``.

    Args:
        template: what a branch is like; it is copied, and its own weights are not used.
        n: number of branches.
        init: how to start a copy, after ``reset_parameters`` of all its modules; called with each
            copy (on its own draw).

    Attributes:
        branches: n.

    Raises:
        TypeError: a part of the template that cannot be branched; the message names its path and
            class.
        ValueError: n that is not positive.

    Example:
        >>> from torch import nn
        >>> template = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> branches = Branches(template, 5)
        >>> routes = pyeff.ops.top_k_routes(torch.randn(2, 5), k=3)
        >>> branches(torch.randn(2, 3, 8, 8), routes).shape
        torch.Size([2, 3, 8, 6, 6])
        >>> list(branches.state_dict())[0]
        '0.0.weight'
    """

    stack: nn.Module

    def __init__(
        self, template: nn.Module, n: int, init: Callable[[nn.Module], Any] | None = None
    ) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"Branches: n must be positive, got {n}")
        _check_parts(template)
        self.branches = n
        self.trace: Trace = trace(template)
        self.stack = _stack_of(template, n)
        # In a tuple, so that it is no submodule: it has no weights to train or to save.
        self._template = (copy.deepcopy(template).to("meta"),)
        self.register_state_dict_post_hook(split_state)
        self.register_load_state_dict_pre_hook(join_state)
        self._draw(template, init)
        self._planned: DerivedValue[BranchPlan | NotInPlanError] = DerivedValue()
        self._warned = False
        self.train(template.training)

    @torch.no_grad()
    def _draw(self, template: nn.Module, init: Callable[[nn.Module], Any] | None) -> None:
        """Starts every branch as a copy of the template would start."""
        sample = copy.deepcopy(template)
        stacks = stacked_tensors(self)
        for branch in range(self.branches):
            for module in reversed(list(sample.modules())):
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            if init is not None:
                init(sample)
            for name, value in (*sample.named_parameters(), *sample.named_buffers()):
                stacks[name][branch].copy_(value)
        for name, parameter in template.named_parameters():
            stacks[name].requires_grad_(parameter.requires_grad)

    def template(self, device: torch.device | str = "meta") -> nn.Module:
        """What a branch is like: a copy of the template, weights not filled in."""
        return copy.deepcopy(self._template[0]).to_empty(device=device)

    @torch.no_grad()
    def copy_of(self, branch: int) -> nn.Module:
        """One branch as an ordinary module with weights of its own.

        Args:
            branch: from 0.

        Raises:
            ValueError: a branch that does not exist.
        """
        if not 0 <= branch < self.branches:
            raise ValueError(f"Branches: branch must be in 0..{self.branches - 1}, got {branch}")
        single = copy.deepcopy(self._template[0])
        state = {name: value[branch].clone() for name, value in stacked_tensors(self).items()}
        single.load_state_dict(state, assign=True)
        return single.train(self.training)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """Runs the chosen branches of every image.

        Args:
            x: ``[N, ...]``, the template's input.
            routes: which branches, index ``[N, k]``.

        Returns:
            ``[N, k, ...]``, the template's output for every (image, branch) pair.

        Raises:
            ValueError: a branch that does not exist, routes for another number of images.
        """
        plan = self._plan_for(x)
        return self._run(x, routes) if plan is None else branch_stage(x, routes, plan)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Branches":
        super()._apply(fn, recurse)
        self._planned.clear()
        return self

    def plan(self) -> BranchPlan:
        """The whole branch as one plan for :func:`pyeff.ops.branch_stage`, of the weights now.

        Batch norms are folded into the convolutions before them, in float64.

        Raises:
            ValueError: something in the branch that a plan does not know; the message says what.
        """
        return build_plan(self.trace, self.stack, self.branches)

    def _plan_for(self, x: Tensor) -> BranchPlan | None:
        """The plan to run on ``x``, or None where the template's calls are to run one by one."""
        if self.training or torch.compiler.is_compiling():
            return None
        modules = list(self.stack.modules())
        tensors = [
            tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if any(module.training for module in modules) or (
            torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
        ):
            return None
        planned = self._planned.get(tensors, self._plan_or_reason)
        if isinstance(planned, BranchPlan):
            return planned
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Branches: runs operator by operator in inference, as no plan holds {planned}",
                stacklevel=4,
            )
        return None

    def _plan_or_reason(self) -> BranchPlan | NotInPlanError:
        """The plan of the tensors as they are, or why there is none."""
        try:
            return self.plan()
        except NotInPlanError as error:
            return error

    def _run(self, x: Tensor, routes: Routes) -> Tensor:
        """The template's calls one after another, each for all pairs."""
        index = routes.index if isinstance(routes, Routes) else routes
        if index.dim() != 2 or index.shape[0] != x.shape[0]:
            raise ValueError(
                f"Branches: routes.index must be [{x.shape[0]}, k] for {x.shape[0]} images, got "
                f"{list(index.shape)}"
            )
        pairs = (index.shape[0], index.shape[1])
        values: dict[str, Any] = {self.trace.input: x}
        branched = {self.trace.input: False}
        for call in self.trace.calls:
            branched[call.name] = call.branched
            values[call.name] = self._call(call, values, branched, routes, pairs)
            for name in call.last:
                del values[name]
        result = values[self.trace.output]
        if self.trace.branched:
            return result.unflatten(0, pairs)
        return result.unsqueeze(1).expand(*pairs, *result.shape[1:])

    def _call(
        self,
        call: Call,
        values: dict[str, Any],
        branched: dict[str, bool],
        routes: Routes,
        pairs: tuple[int, int],
    ) -> Any:
        if call.kind in ("layer", "module"):
            (source,) = call.args
            layer = _part(self.stack, call.target)
            x = values[source.name]
            if call.kind == "module":
                return layer(x)
            if branched[source.name]:
                x = x.unflatten(0, pairs)
            return layer(x, routes).flatten(0, 1)

        def value(argument: Any) -> Any:
            if isinstance(argument, tuple):
                return tuple(value(a) for a in argument)
            if not isinstance(argument, Value):
                return argument
            if argument.name == ROWS:
                return pairs[0] * pairs[1] if call.branched else pairs[0]
            held = values[argument.name]
            if call.kind in ("join", "cat") and call.branched and isinstance(held, Tensor):
                if branched[argument.name]:
                    return held.unflatten(0, pairs) if call.kind == "join" else held
                held = held.unsqueeze(1).expand(*pairs, *held.shape[1:])
                return held if call.kind == "join" else held.flatten(0, 1)
            return held

        args = [value(argument) for argument in call.args]
        result = as_function(call)(*args, **{k: value(v) for k, v in call.kwargs.items()})
        if call.kind == "shape" or not call.branched:
            return result
        if call.kind == "join":
            return result.flatten(0, 1)
        if result.shape[0] != pairs[0] * pairs[1]:
            raise unsupported("", f"{call.target}, which does not keep the rows of the batch apart")
        return result

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"n={self.branches}"


def _part(stack: nn.Module, path: str) -> nn.Module:
    return stack.get_submodule(path)


def _check_parts(template: nn.Module) -> None:
    """Every parameter and buffer belongs to a layer that can be stacked, and to one only."""
    seen: dict[int, str] = {}
    for path, module in template.named_modules(remove_duplicate=False):
        own = [*module._parameters.values(), *module._buffers.values()]
        held = [tensor for tensor in own if tensor is not None]
        if held and stacked_kind(module) != "layer":
            raise unsupported(path, type(module).__name__)
        for tensor in held:
            if seen.setdefault(id(tensor), path) != path:
                raise unsupported(path, f"{type(module).__name__} sharing its parameters")


def _stack_of(template: nn.Module, n: int) -> nn.Module:
    """The template's tree with stacked layers for its leaves."""
    layer = stacked(template, n)
    if layer is template:
        layer = copy.deepcopy(template)
        if hasattr(layer, "inplace"):
            setattr(layer, "inplace", False)  # noqa: B010  # torch types it as a submodule
    if layer is not None:
        return layer
    tree = nn.Module()
    for name, child in template.named_children():
        tree.add_module(name, _stack_of(child, n))
    return tree
