"""Which channels a network's wiring ties, read off torch-pruning's dependency graph."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress._dependency_graph import Entry, dependency_graph, makes_channels, quiet_eval
from pyeff.compress.channel_group import CONSUMER, NORM, PRODUCER, SCALE, Member

_INPUT, _OUTPUT = "the network's input", "the network's output"

# A channel of one layer: the layer's name, the role it plays there, the channel's number.
Key = tuple[str, str, int]


@dataclass
class Ties:
    """Tied channels.

    Attributes:
        groups: the members of every group that can be removed.
        left_out: for layers whose channels cannot, the reason.
    """

    groups: list[list[Member]]
    left_out: dict[str, str]


@dataclass
class _Classes:
    """Channels in classes of those that are tied: union-find, and why a class cannot be removed."""

    parent: dict[Key, Key] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)  # of parameters that stand alone

    def find(self, key: Key) -> Key:
        root = self.parent.setdefault(key, key)
        while root != self.parent[root]:
            self.parent[root] = self.parent[self.parent[root]]
            root = self.parent[root]
        self.parent[key] = root
        return root

    def union(self, one: Key, other: Key) -> None:
        first, second = self.find(one), self.find(other)
        if first != second:
            self.parent[second] = first
            if second in self.reasons:
                self.reasons.setdefault(first, self.reasons.pop(second))

    def block(self, key: Key, reason: str) -> None:
        self.reasons.setdefault(self.find(key), reason)

    def all(self) -> dict[Key, list[Key]]:
        found = defaultdict(list)
        for key in list(self.parent):
            found[self.find(key)].append(key)
        return found


def find_ties(model: nn.Module, inputs: tuple[Tensor, ...]) -> Ties:
    """The channels that are tied, in groups of equal form.

    Args:
        model: the network.
        inputs: of one forward pass.

    Raises:
        ValueError: the network cannot be traced.
        ImportError: torch-pruning is missing.
    """
    with quiet_eval(model):
        graph, outputs = dependency_graph(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    names |= {parameter: name for name, parameter in model.named_parameters()}
    classes = _Classes()
    for module, name in names.items():
        if makes_channels(module) and module in graph.module2node:
            _tie(graph, module, name, names, classes)
    _tie_grouped(names, classes)
    _block_unusable(graph, names, outputs, classes)
    return _collect(names, classes)


def is_depthwise(module: Any) -> bool:
    """Whether torch-pruning takes it for depth-wise."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def _outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _tie(graph: Any, module: nn.Module, name: str, names: dict, classes: _Classes) -> None:
    """Ties a layer's output channels to what dies with them."""
    free = [
        channel
        for channel in range(_outputs(module))
        if (name, PRODUCER, channel) not in classes.parent
    ]
    if not free:
        return
    pruner = graph.get_pruner_of_module(module)
    for item in graph.get_pruning_group(module, pruner.prune_out_channels, free):
        target = item.dep.target.module
        role = _role(target, graph.is_out_channel_pruning_fn(item.dep.handler), names)
        if role is None:
            continue
        label = _label(target, names)
        if isinstance(target, nn.Parameter):
            classes.axes[label] = item.dep.target.pruning_dim
        for channel, root in zip(item.idxs, item.root_idxs, strict=True):
            if root is None:  # heads of an attention that several others share
                for one in free:
                    classes.block((name, PRODUCER, one), f"its channels are repeated for {label}")
                break
            own: Key = (name, PRODUCER, root)
            classes.union(own, (label, role, channel))
            if role == "":
                classes.block(own, f"tied to {label}")
            elif channel >= _width(target, role, item.dep.target.pruning_dim):
                classes.block(own, f"its way to {label} is not known")


def _role(target: Any, is_output: bool, names: dict) -> str | None:
    """What a node of the graph does with the channels: ``""`` for what cannot be cut, or None."""
    if makes_channels(target):
        return PRODUCER if is_output else CONSUMER
    if isinstance(target, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return NORM
    if isinstance(target, nn.PReLU):
        return SCALE if target.num_parameters > 1 else None
    if isinstance(target, nn.Parameter):
        return SCALE
    if isinstance(target, Entry) or target in names or type(target).__name__ == "_OutputOp":
        return ""
    return None  # torch-pruning's own nodes: sums, concatenations, reshapes


def _width(target: Any, role: str, axis: int) -> int:
    """How many channels a node has on the side of a role."""
    if isinstance(target, nn.Parameter):
        return target.shape[axis]
    if role == CONSUMER:
        return target.in_features if isinstance(target, nn.Linear) else target.in_channels
    if role == PRODUCER:
        return _outputs(target)
    return target.num_parameters if role == SCALE else target.num_features


def _label(target: Any, names: dict) -> str:
    if isinstance(target, Entry):
        return _INPUT
    if target in names:
        return names[target]
    return _OUTPUT


def _tie_grouped(names: dict, classes: _Classes) -> None:
    """Ties all that enters or leaves one group of a convolution.

    Groups of equal size are what such a layer can be cut to, whole groups what it can always be
    cut by.
    """
    for module, name in names.items():
        if (
            not isinstance(module, nn.modules.conv._ConvNd)
            or module.groups == 1
            or is_depthwise(module)
        ):
            continue
        read, made = (n // module.groups for n in (module.in_channels, module.out_channels))
        for group in range(module.groups):
            keys = [(name, CONSUMER, group * read + i) for i in range(read)]
            keys += [(name, PRODUCER, group * made + i) for i in range(made)]
            for key in keys:
                if key not in classes.parent:
                    classes.block(key, f"{name} reads channels that no layer makes")
                classes.union(keys[0], key)


def _block_unusable(graph: Any, names: dict, outputs: list[Any], classes: _Classes) -> None:
    """Marks the classes that cannot be removed although torch-pruning would."""
    holders = _holders(names)
    for module, name in names.items():
        if isinstance(module, nn.Parameter) or not makes_channels(module):
            continue
        if graph.module2node.get(module) is None:
            continue
        weight = module._parameters.get("weight")
        others = [other for other in holders.get(id(weight), ()) if other != name]
        shared = f"it shares its weight with {others[0]}" if others else None
        for channel in range(_width(module, CONSUMER, 0)) if shared else ():
            classes.block((name, CONSUMER, channel), f"{name}, which reads it: {shared}")
        if graph.module2node[module].grad_fn in outputs:
            reason: str | None = f"it makes {_OUTPUT}"
        elif is_depthwise(module) and module.in_channels != module.out_channels:
            reason = "each of its groups reads several channels and makes one"
        elif not isinstance(weight, nn.Parameter):
            reason = "its weight is computed from other parameters"
        else:
            reason = shared
        if reason is not None:
            for channel in range(_outputs(module)):
                classes.block((name, PRODUCER, channel), reason)


def _holders(names: dict) -> dict[int, list[str]]:
    """The modules that have a parameter of their own, by its id: several, where it is shared."""
    found: dict[int, list[str]] = defaultdict(list)
    for module, name in names.items():
        if not isinstance(module, nn.Parameter):
            for parameter in module.parameters(recurse=False):
                found[id(parameter)].append(name)
    return found


def _collect(names: dict, classes: _Classes) -> Ties:
    """Classes that can be removed, in groups of those that take as many channels of each layer."""
    order = {name: at for at, name in enumerate(names.values())}
    groups: dict[tuple, list[dict]] = defaultdict(list)
    left_out: dict[str, str] = {}
    for root, keys in classes.all().items():
        reason = classes.reasons.get(root)
        parts: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name, role, channel in keys:
            parts[name, role].append(channel)
        if reason is not None:
            left_out |= {
                name: reason for name, role in parts if role == PRODUCER and name not in left_out
            }
        elif any(role == PRODUCER for _, role in parts):
            form = tuple(sorted((name, role, len(found)) for (name, role), found in parts.items()))
            groups[form].append(parts)
    made = []
    for form, units in groups.items():
        members = [
            Member(
                name,
                role,
                torch.tensor([sorted(unit[name, role]) for unit in units]),
                classes.axes.get(name, 0),
            )
            for name, role, _ in sorted(form, key=lambda part: (order[part[0]], part[1]))
        ]
        made.append(_sorted_by_channel(members))
    return Ties(made, left_out)


def _sorted_by_channel(members: list[Member]) -> list[Member]:
    first = next(member for member in members if member.role == PRODUCER)
    by = first.index[:, 0].argsort()
    return [Member(m.name, m.role, m.index[by], m.axis) for m in members]
