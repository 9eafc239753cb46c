"""Puts tied channels to the test: what is disturbed in a group may differ nowhere else."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress._dependency_graph import makes_channels, quiet_eval
from pyeff.compress._ties import is_depthwise
from pyeff.compress.channel_group import CONSUMER, PRODUCER, ChannelGroup

_ROUNDS = 3
_OUTPUT = ""

# Which channels differ at each layer's input, by the layer's name; _OUTPUT for the network's.
Changed = dict[str, set[int]]


def wrong_groups(
    model: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[ChannelGroup]
) -> dict[ChannelGroup, str]:
    """Groups whose channels do not flow where their members say, with what was seen instead.

    A wiring that the dependency graph reads wrongly (a shuffle of channels, a reshape across them)
    would else remove the wrong channels without a word. Random halves of all groups are disturbed
    where they are made; every convolution and linear layer says which of its input channels differ,
    and goes on with its undisturbed input, so that only direct readers see the disturbance.

    Args:
        model: the network.
        inputs: of one forward pass.
        groups: what to test.
    """
    probe = _Probe(model, inputs)
    random = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS):
        halves = {group: torch.rand(group.channels, generator=random) < 0.5 for group in groups}
        if _surprise(probe.disturbed(halves), halves):
            return _one_by_one(probe, groups, random)
    return {}


def _one_by_one(
    probe: "_Probe", groups: Sequence[ChannelGroup], random: torch.Generator
) -> dict[ChannelGroup, str]:
    """Which of the groups are wrong, each tested for itself."""
    wrong = {}
    for group in groups:
        half = torch.rand(group.channels, generator=random) < 0.5
        for chosen in (half, ~half):
            surprise = _surprise(probe.disturbed({group: chosen}), {group: chosen})
            if surprise:
                wrong[group] = surprise
                break
    return wrong


def _surprise(changed: Changed, chosen: dict[ChannelGroup, Tensor]) -> str:
    """What differs although no disturbed channel leads there; empty for nothing."""
    expected: Changed = defaultdict(set)
    for group, channels in chosen.items():
        for member in group.members:
            if member.role == CONSUMER:
                expected[member.name] |= set(member.index[channels].flatten().tolist())
    for name, found in changed.items():
        if name == _OUTPUT and found:
            return "its channels reach the network's output"
        extra = found - expected[name]
        if extra:
            return f"its channels reach channel {min(extra)} of {name} in a way that is not known"
    return ""


class _Probe:
    """A network whose layers' inputs are known, run again with disturbed channels."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.inputs = model, inputs
        self.layers = {
            name: module for name, module in model.named_modules() if makes_channels(module)
        }
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.seen[name].append(args[0].detach().clone())

            return hook

        # Depth-wise convolutions only pass their channels on.
        self.readers = [name for name, layer in self.layers.items() if not is_depthwise(layer)]
        with self._hooked({name: keep(name) for name in self.readers}, {}):
            self.output = self._run()

    def disturbed(self, chosen: dict[ChannelGroup, Tensor]) -> Changed:
        """Which input channels differ when the chosen channels of some groups are disturbed."""
        noisy: dict[str, set[int]] = defaultdict(set)
        for group, channels in chosen.items():
            for member in group.members:
                if member.role == PRODUCER:
                    noisy[member.name] |= set(member.index[channels].flatten().tolist())
        changed: Changed = defaultdict(set)
        calls: dict[str, int] = defaultdict(int)

        def compare(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                before = self.seen[name][calls[name]]
                calls[name] += 1
                changed[name] |= _differing(args[0], before, _channel_axis(module))
                return (before, *args[1:])

            return hook

        def disturb(name: str) -> Any:
            at = sorted(noisy[name])

            def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                index = torch.tensor(at, device=out.device)
                axis = _channel_axis(module)
                # Upwards: a ReLU would swallow the other direction.
                step = (1 + out.abs().amax()).expand_as(out.index_select(axis, index))
                return out.clone().index_add_(axis, index, step)

            return hook

        before = {name: compare(name) for name in self.readers}
        after = {name: disturb(name) for name in noisy if noisy[name]}
        with self._hooked(before, after):
            output = self._run()
        for one, other in zip(output, self.output, strict=True):
            if bool(_differs(one, other).any()):
                changed[_OUTPUT].add(0)
        return changed

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        """The tensors of the network's output."""
        with quiet_eval(self.model):
            return _flat(self.model(*self.inputs))

    @contextlib.contextmanager
    def _hooked(self, before: dict[str, Any], after: dict[str, Any]) -> Iterator[None]:
        handles = [self.layers[n].register_forward_pre_hook(hook) for n, hook in before.items()]
        handles += [self.layers[n].register_forward_hook(hook) for n, hook in after.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _channel_axis(module: nn.Module) -> int:
    """Counted from the end, since a map may come without a batch."""
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


def _differing(one: Tensor, other: Tensor, axis: int) -> set[int]:
    differs = _differs(one, other).movedim(axis, 0).unsqueeze(-1).flatten(1).any(1)
    return set(differs.nonzero().flatten().tolist())


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ by more than another order of summation makes them differ."""
    if not one.is_floating_point():
        return one != other
    one, other = one.nan_to_num(), other.nan_to_num()
    scale = torch.maximum(one.abs().amax(), other.abs().amax()) if one.numel() else 0
    return (one - other).abs() > 32 * torch.finfo(one.dtype).eps * scale


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _flat(part)]
    return []
