"""From a traced template and its stacked layers to the plan that runs a branch in one call."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.nn.branch_batch_norm2d import BranchBatchNorm2d
from pyeff.nn.branch_conv2d import BranchConv2d
from pyeff.nn.branch_linear import BranchLinear
from pyeff.nn.branch_trace import Call, Trace, Value
from pyeff.nn.pad_shortcut import pad_shortcut
from pyeff.ops import BranchPlan

ACTIVATIONS: dict[Any, str] = {
    **{target: "relu" for target in (nn.ReLU, F.relu, torch.relu, "relu")},
    **{target: "relu6" for target in (nn.ReLU6, F.relu6)},
    **{target: "silu" for target in (nn.SiLU, F.silu)},
    **{target: "hardswish" for target in (nn.Hardswish, F.hardswish)},
}
SAME = (nn.Identity, nn.Dropout, nn.Dropout2d, "contiguous")
POOL_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.max_pool2d: (
        *("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    F.avg_pool2d: (
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
        "divisor_override",
    ),
}
POOL_ARGUMENTS[torch.max_pool2d] = POOL_ARGUMENTS[F.max_pool2d]
Slot = int


class NotInPlanError(ValueError):
    """A branch that no plan can hold; the message says what is in the way."""


def build_plan(trace: Trace, stack: nn.Module, n: int) -> BranchPlan:
    """The plan of a template's stacked layers, batch norms folded into the layers before them.

    Raises:
        NotInPlanError: something in the branch that a plan does not know.
    """
    return _Lowering(trace, stack, n).run()


class _Lowering:
    def __init__(self, trace: Trace, stack: nn.Module, n: int) -> None:
        self.trace, self.stack, self.n = trace, stack, n
        self.readers: dict[str, list[Call]] = {}
        for call in trace.calls:
            for name in _read(call):
                self.readers.setdefault(name, []).append(call)
        channels, vector = self._input()
        self.plan = BranchPlan(n, channels, vector=vector)
        self.slots: dict[str, Slot] = {trace.input: 0}
        self.channels: dict[str, int | None] = {trace.input: channels}
        self.folded: dict[str, str] = {}  # a norm's result -> the result of the layer it is in

    @torch.no_grad()
    def run(self) -> BranchPlan:
        for call in self.trace.calls:
            if call.kind == "shape":
                continue
            if call.name in self.folded:
                source = self.folded[call.name]
                self.slots[call.name] = self.slots[source]
            else:
                source = _first(call)
                self.slots[call.name] = self._lower(call, self.slots[source])
            self.channels.setdefault(call.name, self.channels[source])
        if self.slots[self.trace.output] == 0:
            raise NotInPlanError("a template that does nothing")
        self.plan.returns(self.slots[self.trace.output])
        return self.plan

    def _input(self) -> tuple[int, bool]:
        """Channels of the input, or features of an input vector, as the first layers tell."""
        same, position = [self.trace.input], 0
        while position < len(same):
            for call in self.readers.get(same[position], []):
                layer = self.stack.get_submodule(call.target) if call.kind == "layer" else None
                if isinstance(layer, BranchConv2d):
                    return layer.in_channels, False
                if isinstance(layer, BranchBatchNorm2d):
                    return layer.channels, False
                if isinstance(layer, BranchLinear) and position == 0:
                    return layer.in_features, True
                if call.kind in ("module", "function", "join"):
                    same.append(call.name)
            position += 1
        raise NotInPlanError("a template whose layers do not tell how many channels the input has")

    def _lower(self, call: Call, source: Slot) -> Slot:
        if call.kind == "layer":
            return self._layer(call, source)
        if call.kind == "join":
            return self._join(call)
        if call.kind == "cat":
            return self._concat(call)
        if call.kind == "module":
            return self._module(call, self.stack.get_submodule(call.target), source)
        return self._function(call, source)

    # --- layers with parameters -------------------------------------------------------------------

    def _layer(self, call: Call, source: Slot) -> Slot:
        layer = self.stack.get_submodule(call.target)
        if isinstance(layer, BranchBatchNorm2d):
            scale, shift = _scale_shift(layer, call.target)
            kept = layer.running_mean.dtype
            return self.plan.scale_shift(source, _stored(scale, kept), _stored(shift, kept))
        if isinstance(layer, BranchLinear):
            self.channels[call.name] = layer.out_features
            kept, bias = layer.weight.dtype, layer.bias
            stored = None if bias is None else _stored(bias.detach(), kept)
            return self.plan.linear(source, _stored(layer.weight.detach(), kept), stored)
        return self._conv(call, cast(BranchConv2d, layer), source)

    def _conv(self, call: Call, layer: BranchConv2d, source: Slot) -> Slot:
        weight = layer.weight.double()
        bias = None if layer.bias is None else layer.bias.double()
        norm = self._norm_after(call)
        if norm is not None:
            after = cast(BranchBatchNorm2d, self.stack.get_submodule(norm.target))
            scale, shift = _scale_shift(after, norm.target)
            weight = weight * scale[:, :, None, None, None]
            bias = shift if bias is None else bias * scale + shift
            self.folded[norm.name] = call.name
        self.channels[call.name] = layer.out_channels
        kept = layer.weight.dtype
        return self.plan.conv2d(
            source,
            _stored(weight, kept),
            None if bias is None else _stored(bias, kept),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    def _norm_after(self, call: Call) -> Call | None:
        """The norm that alone reads a convolution's result, if that is so."""
        readers = self.readers.get(call.name, [])
        if len(readers) != 1 or readers[0].kind != "layer" or call.name == self.trace.output:
            return None
        after = self.stack.get_submodule(readers[0].target)
        return readers[0] if isinstance(after, BranchBatchNorm2d) else None

    # --- what treats every row by itself ----------------------------------------------------------

    def _module(self, call: Call, module: nn.Module, source: Slot) -> Slot:
        if type(module) in ACTIVATIONS:
            return self.plan.activation(source, ACTIVATIONS[type(module)])
        if type(module) in SAME:
            return source
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(call, source)
        if isinstance(module, nn.MaxPool2d) and not module.return_indices:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            return self._pool(source, False, {name: getattr(module, name) for name in names})
        if isinstance(module, nn.AvgPool2d):
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
            options = {name: getattr(module, name) for name in (*names, "divisor_override")}
            return self._pool(source, True, options)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return self._adaptive(source, module.output_size, True)
        if isinstance(module, nn.AdaptiveMaxPool2d) and not module.return_indices:
            return self._adaptive(source, module.output_size, False)
        raise NotInPlanError(f"{type(module).__name__} at {call.target!r}")

    def _function(self, call: Call, source: Slot) -> Slot:
        target, rest = call.target, call.args[1:]
        if target in ACTIVATIONS:
            return self.plan.activation(source, ACTIVATIONS[target])
        if target in SAME:
            return source
        if target is pad_shortcut:
            return self._pad_shortcut(call, source)
        if target in POOL_ARGUMENTS:
            options = {**dict(zip(POOL_ARGUMENTS[target], rest, strict=False)), **call.kwargs}
            if not options.pop("return_indices", False):
                return self._pool(source, target is F.avg_pool2d, options)
        if target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            options = {**dict(zip(("output_size", "return_indices"), rest, strict=False))}
            options |= call.kwargs
            if not options.get("return_indices", False):
                return self._adaptive(
                    source, options["output_size"], target is F.adaptive_avg_pool2d
                )
        if self._is_flatten(call):
            return self._flatten(call, source)
        if target in (torch.mean, "mean"):
            return self._mean(call, source)
        raise NotInPlanError(f"a call of {getattr(target, '__name__', target)}")

    def _pool(self, source: Slot, average: bool, options: dict[str, Any]) -> Slot:
        if options.pop("divisor_override", None) is not None:
            raise NotInPlanError("average pooling with a divisor of its own")
        kernel = options.pop("kernel_size")
        method: Callable[..., Slot] = self.plan.avg_pool2d if average else self.plan.max_pool2d
        return method(source, kernel, **options)

    def _adaptive(self, source: Slot, size: Any, average: bool) -> Slot:
        if isinstance(size, (tuple, list)) and None in size:
            raise NotInPlanError("adaptive pooling that keeps a side as it is")
        return self.plan.adaptive_pool2d(
            source, size if isinstance(size, int) else (size[0], size[1]), average=average
        )

    def _flatten(self, call: Call, source: Slot) -> Slot:
        self.channels[call.name] = None
        return self.plan.flatten(source)

    def _is_flatten(self, call: Call) -> bool:
        """Whether a call makes ``[R, everything else]``."""
        if call.target not in (torch.flatten, "flatten"):
            return False
        names = ("start_dim", "end_dim")
        options = {**dict(zip(names, call.args[1:], strict=False)), **call.kwargs}
        return options.get("start_dim", 0) == 1 and options.get("end_dim", -1) == -1

    def _mean(self, call: Call, source: Slot) -> Slot:
        options = {**dict(zip(("dim", "keepdim"), call.args[1:], strict=False)), **call.kwargs}
        dims = options.pop("dim")
        keep = options.pop("keepdim", False)
        if options or set(dims if isinstance(dims, tuple) else (dims,)) not in ({2, 3}, {-1, -2}):
            raise NotInPlanError("a mean over other dimensions than height and width")
        pooled = self.plan.adaptive_pool2d(source, 1)
        return pooled if keep else self.plan.flatten(pooled)

    def _pad_shortcut(self, call: Call, source: Slot) -> Slot:
        names = ("stride", "ratio", "front", "back")
        options = {"front": 0, "back": 0, **dict(zip(names, call.args[1:], strict=False))}
        options |= call.kwargs
        stride, ratio, front, back = (options[name] for name in names)
        channels = self.channels[_first(call)]
        if channels is None:
            raise NotInPlanError("a padded shortcut of a map whose channels are not known")
        if stride != 1:
            source = self.plan.avg_pool2d(source, stride, ceil_mode=True)
        outputs = ratio * channels + front + back
        self.channels[call.name] = outputs
        if outputs == channels and ratio == 1 and front == 0:
            return source
        like = next(self.stack.parameters())
        places = front + ratio * torch.arange(channels, device=like.device)
        held = (places >= 0) & (places < outputs)
        weight = torch.zeros(outputs, channels, 1, 1, device=like.device)
        weight[places[held], torch.arange(channels, device=like.device)[held]] = 1
        groups = 1
        if front == 0 and back == 0:  # every channel makes the next ``ratio`` ones
            groups = channels
            weight = weight.sum(1, keepdim=True)
        weight = _stored(weight.repeat(self.n, 1, 1, 1, 1), like.dtype)
        return self.plan.conv2d(source, weight, groups=groups)

    # --- what joins two values --------------------------------------------------------------------

    def _join(self, call: Call) -> Slot:
        name = getattr(call.target, "__name__", "")
        both = [argument for argument in call.args if isinstance(argument, Value)]
        if name != "add" or len(both) != 2 or len(call.args) != 2 or call.kwargs:
            raise NotInPlanError(f"{name or call.target} of a value and a number, or the like")
        return self.plan.add(self.slots[both[0].name], self.slots[both[1].name])

    def _concat(self, call: Call) -> Slot:
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        values: Sequence[Value] = call.args[0]
        if dim not in (1, -3):
            raise NotInPlanError(f"a concatenation along dimension {dim}")
        counts = [self.channels[value.name] for value in values]
        known = [count for count in counts if count is not None]
        self.channels[call.name] = sum(known) if len(known) == len(counts) else None
        return self.plan.concat([self.slots[value.name] for value in values])


def _scale_shift(norm: BranchBatchNorm2d, path: str) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as an affine map, float64 ``[B, C]`` each."""
    if norm.uses_batch_statistics:
        raise NotInPlanError(f"batch statistics at {path!r}")
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in a layer's dtype, but float32 for half precision: kernels compute in it anyway."""
    return value.to(torch.promote_types(dtype, torch.float32))


def _read(call: Call) -> list[str]:
    """Names of all values that a call reads."""
    found: list[str] = []
    waiting: list[Any] = [*call.args, *call.kwargs.values()]
    while waiting:
        argument = waiting.pop()
        if isinstance(argument, tuple):
            waiting += argument
        elif isinstance(argument, Value):
            found.append(argument.name)
    return found


def _first(call: Call) -> str:
    """The name of a call's first value."""
    argument = call.args[0]
    while isinstance(argument, tuple):
        argument = argument[0]
    if not isinstance(argument, Value):
        raise NotInPlanError(f"{getattr(call.target, '__name__', call.target)} of a number first")
    return argument.name
