"""Group sparsity: neurons that the data do not need shrink to exact zeros while the net trains."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress.channel_group import ChannelGroup
from pyeff.compress.constants import norms_after, readers
from pyeff.compress.factor_forms import shared_parameters
from pyeff.compress.groups import Example, map_channels
from pyeff.compress.parameter_count import ParameterCount
from pyeff.compress.prox import shrink_groups, shrink_groups_in_metric
from pyeff.compress.proximal import Proximal
from pyeff.compress.strength import (
    DOSE,
    TargetRule,
    check_factors,
    check_strength,
    check_target,
    critical_strength,
    level_for_count,
    protected,
)

_OP = "GroupSparsity"


class GroupSparsity(Proximal):
    """Sparse group lasso on a network's neurons, by proximal steps after the optimiser's.

    A neuron is an output filter with its bias, together with all that is tied to it
    (:func:`~pyeff.compress.channel_groups`). After the optimiser's steps on the loss alone every
    neuron is shortened by ``t lambda_l sqrt(P_l)``: t is the learning rate, ``P_l`` the number of
    the neuron's parameters. What is no longer than that becomes exactly zero, for
    :func:`~pyeff.compress.shrink` to remove.

    With strength ``"auto"`` ``lambda_l sqrt(P_l)`` is s times the mean length of the layer's
    neurons at the start. Without a target ``s = 2 / (sum of the learning rates of schedule)``: a
    neuron that the data do not hold has died after half of it. With ``target_params`` s is found
    anew at every application, so that the target is met at the end of ``schedule``:
    ``s = L / T + G / t``, L the level up to which neurons must die, T the sum of the learning rates
    to come, G what the data gave back since the last application. Then the penalty ends, and the
    dead stay dead: a schedule of the first three quarters of the epochs leaves the rest of the
    training to the smaller network.

    With Adam the step is taken in its metric (``sqrt(v) + eps`` for every parameter); groups that
    it has not moved yet are passed over. Dead neurons lose their momentum; without ``mask`` their
    gradient may revive them.

    Args:
        model: the network, not wrapped in DistributedDataParallel. The penalty depends on the
            parameters alone, so that all processes take the same step.
        example: an input, as for :func:`~pyeff.compress.channel_groups`.
        strength: lambda, not negative, or ``"auto"``.
        alpha: share of the l1 term, in [0, 1]; the paper uses 0 and 0.5.
        first_layers: how many groups, in the order of the modules, are penalised less.
        first_factor: by which factor.
        include_norm: whether scales and shifts of batch norms belong to a neuron.
        floor: neurons that every group keeps; by default 8 or 5 %, whichever is more.
        layers: factors of the penalty for layers by name, 1 for those not named; a group takes the
            smallest of its producers'.
        every: ``"epoch"``, or a number of steps, with the same sum over an epoch.
        steps_per_epoch: needed where ``every`` counts steps.
        tied: ``"joint"``: neurons of several layers whose outputs are tied are one group;
            ``"skip"`` leaves those alone.
        target_params: share of the network's parameters to be kept, in (0, 1].
        schedule: the learning rate of each epoch; needed for ``"auto"``.
        mask: whether dead neurons stay dead; by default only on the way to a target, where those
            that come back would have to be put down again at the cost of the others.

    Attributes:
        groups: the groups that are penalised.
        left_out: for layers that are not, why; among them those of a group of which a filter or
            bias takes no gradient or belongs to another layer too.

    Raises:
        TypeError, ValueError: numbers out of range, unknown layers, a network without channels
            that can be removed, a target that the floors do not allow.
        ImportError: torch-pruning is missing.

    Source: Alvarez, Salzmann, "Learning the Number of Neurons in Deep Networks", NIPS 2016.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> sparsity = GroupSparsity(net, torch.randn(1, 3, 8, 8), strength=0.01)
        >>> sparsity.attach(optimizer)
        >>> sparsity.end_epoch(lr=0.1)
        >>> sparsity.statistics()["live"]
        {'0': 32}
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        strength: float | str = "auto",
        alpha: float = 0.0,
        first_layers: int = 1,
        first_factor: float = 0.4,
        include_norm: bool = False,
        floor: int | None = None,
        layers: Mapping[str, float] | None = None,
        every: str | int = "epoch",
        steps_per_epoch: int | None = None,
        tied: str = "joint",
        target_params: float | None = None,
        schedule: Sequence[float] | None = None,
        mask: bool | None = None,
    ) -> None:
        super().__init__(model, every, steps_per_epoch, schedule)
        check_strength(_OP, strength)
        check_target(_OP, target_params, strength)
        _check(alpha, first_layers, first_factor, floor, tied)
        if strength == "auto" and not sum(schedule or ()):
            raise ValueError(
                f'{_OP}: schedule must have a learning rate above 0 for strength "auto", got '
                f"{schedule}"
            )
        found = map_channels(model, example, include_norm=include_norm)
        self.left_out = dict(found.left_out)
        self._all = found.groups
        check_factors(_OP, layers, [name for group in found.groups for name in group.producers])
        factors = self._factors(found.groups, dict(layers or {}), first_layers, first_factor, tied)
        self.groups = tuple(group for group in found.groups if factors[group] > 0)
        if not self.groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise ValueError(
                f"{_OP}: model must have channels that can be removed, got none: {why}"
            )
        self.strength, self.alpha = strength, alpha
        self.mask = target_params is not None if mask is None else mask
        self.target_params, self._rule = target_params, TargetRule()
        self._floors = {
            group: min(group.channels, default_floor(group.channels) if floor is None else floor)
            for group in self.groups
        }
        self._factor = {group: factors[group] for group in self.groups}
        self._initial = {g: float(g.gather(model).double().norm(dim=1).mean()) for g in self.groups}
        self._is_done = False
        self._masked = {g: torch.zeros(g.channels, dtype=torch.bool) for g in self.groups}
        self._count = ParameterCount(model, self.groups)
        self._biases = self._most_biases(example) if target_params is not None else 0
        self._check_reachable()

    def _factors(
        self,
        groups: Sequence[ChannelGroup],
        layers: dict[str, float],
        first_layers: int,
        first_factor: float,
        tied: str,
    ) -> dict[ChannelGroup, float]:
        factors, shared = {}, shared_parameters(self.model)
        for at, group in enumerate(groups):
            factor = min(layers.get(name, 1.0) for name in group.producers)
            if tied == "skip" and self._is_tied(group):
                factor = 0.0
                for name in group.producers:
                    self.left_out[name] = "its channels are tied to another layer's"
            reason = self._fixed(group, shared)
            if reason is not None:
                factor = 0.0
                self.left_out |= dict.fromkeys(group.producers, reason)
            factors[group] = factor * (first_factor if at < first_layers else 1.0)
        return factors

    def _fixed(self, group: ChannelGroup, shared: Collection[str]) -> str | None:
        """Why a group's parameters cannot be moved."""
        for name in group.parameters:
            if not self.model.get_parameter(name).requires_grad:
                return f"{name} takes no gradient"
            if name in shared:
                return f"another layer has {name} too"
        return None

    def _is_tied(self, group: ChannelGroup) -> bool:
        """Whether more than one layer, not counting those of several groups, makes its channels."""
        modules = [self.model.get_submodule(name) for name in group.producers]
        return sum(getattr(module, "groups", 1) == 1 for module in modules) > 1

    def _most_biases(self, example: Example) -> int:
        """Biases that removal may have to add: what dead channels still carry goes on in them."""
        layers = {
            member.name: self.model.get_submodule(member.name)
            for group in self.groups
            for member in (readers(self.model, group) if group.norms else ())
        }
        bare = {name: layer for name, layer in layers.items() if layer.bias is None}
        inputs = (example,) if isinstance(example, Tensor) else tuple(example)
        taken = norms_after(self.model, inputs, bare) if bare else {}
        rest = [layer for name, layer in bare.items() if name not in taken]
        return sum(
            layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features
            for layer in rest
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
        )

    def _check_reachable(self) -> None:
        if self.target_params is None:
            return
        floors = [torch.arange(g.channels) < self._floors[g] for g in self.groups]
        least = self._count.after(floors) + self._biases
        if least > self.target_params * self._count.total:
            raise ValueError(
                f"{_OP}: target_params must be at least {least / self._count.total:.4f}, which the "
                f"floors and the layers that are left out keep, got {self.target_params}"
            )

    def _penalised(self) -> Iterable[str]:
        return [name for group in self.groups for name in group.parameters]

    def _weight(self, group: ChannelGroup, metric: float) -> float:
        """w: how far a step of one times the strength shortens a neuron."""
        if self.strength == "auto":
            return max(self._factor[group] * self._initial[group] * metric, 1e-300)
        return self._factor[group] * math.sqrt(group.size)

    @torch.no_grad()
    def _apply(self, step: float, ahead: float) -> None:
        if step <= 0 or self._is_done:
            return
        parameters = dict(self.model.named_parameters())
        metric = self._metric()
        weights, critical = {}, {}
        moved = self._stepped({group: group.parameters for group in self.groups}, metric)
        for group in moved:
            z = group.gather(parameters)
            scale = None if metric is None else group.gather(metric)
            weights[group] = self._weight(group, 1.0 if scale is None else float(scale.mean()))
            in_metric = z if scale is None else z.double() * scale
            critical[group] = critical_strength(in_metric, weights[group], self.alpha).cpu()
        self.strength_used = self._strength_for(critical, step, ahead)
        dead = {}
        for group in moved:
            threshold = step * self.strength_used * weights[group]
            if threshold > 0:
                dead[group] = self._shrink(group, parameters, metric, threshold, critical[group])
        self._clear(dead, weights=False)
        for group in dead if self.mask else ():
            self._masked[group] |= dead[group]
        if self.target_params is not None and ahead <= step:
            self._is_done = True
            for group in self.groups:
                self._masked[group] |= group.dead(parameters).cpu()

    def _strength_for(
        self, critical: dict[ChannelGroup, Tensor], step: float, ahead: float
    ) -> float:
        """s or lambda, for this application."""
        if not isinstance(self.strength, str):
            return float(self.strength)
        if self.target_params is None:
            return DOSE / sum(self.schedule or ())
        shelter = {g: protected(critical[g], self._floors[g]) for g in critical}
        # Those that are passed over stay as they are.
        fixed = {g: ~g.dead(self.model).cpu() for g in self.groups if g not in critical}

        def count(level: float) -> int:
            alive = {g: (critical[g] > level) | shelter[g] for g in critical} | fixed
            return self._count.after([alive[g] for g in self.groups])

        most = int(self.target_params * self._count.total) - self._biases
        level = level_for_count(torch.cat(list(critical.values())), count, most)
        self._check_within_reach(count(level), most, [group.name for group in fixed])
        return self._rule.strength(level, step, ahead)

    def _shrink(
        self,
        group: ChannelGroup,
        parameters: Mapping[str, Tensor],
        metric: Mapping[str, Tensor] | None,
        threshold: float,
        critical: Tensor,
    ) -> Tensor:
        """Takes the step in one group; the neurons that are dead after it, on the CPU."""
        z = group.gather(parameters)
        tau, l1 = (1 - self.alpha) * threshold, self.alpha * threshold / math.sqrt(group.size)
        if metric is None:
            shrunk = shrink_groups(z, tau, l1=l1)
        else:
            shrunk = shrink_groups_in_metric(z, group.gather(metric), tau, l1=l1)
        dies = shrunk.eq(0).all(1) & z.ne(0).any(1)
        spared = protected(critical, self._floors[group]).to(z.device) & dies
        shrunk = torch.where(spared[:, None], z, shrunk)
        group.write(parameters, shrunk)
        return shrunk.eq(0).all(1).cpu()

    @torch.no_grad()
    def _hold(self) -> None:
        """Dead neurons stay dead under a mask."""
        self._clear({group: dead for group, dead in self._masked.items() if dead.any()}, True)

    def _clear(self, dead: Mapping[ChannelGroup, Tensor], weights: bool) -> None:
        """Sets the momentum of dead neurons to zero, and their weights if asked to."""
        targets = [self._state(key) for key in ("momentum_buffer", "exp_avg")] if dead else []
        if weights and dead:
            targets.append(dict(self.model.named_parameters()))
        for group, channels in dead.items():
            for tensors in targets:
                group.clear(tensors, channels)

    def statistics(self) -> dict[str, Any]:
        """How far it has come.

        Returns:
            ``live``: neurons that are not dead, by group; ``channels``: how many there were;
            ``params``: parameters that are left when the dead are removed; ``share`` of all;
            ``strength`` of the last application.
        """
        alive = [~group.dead(self.model).cpu() for group in self.groups]
        params = self._count.after(alive)
        return {
            "live": {g.name: int(a.sum()) for g, a in zip(self.groups, alive, strict=True)},
            "channels": {group.name: group.channels for group in self.groups},
            "params": params,
            "share": params / self._count.total,
            "strength": self.strength_used,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly, as JSON can hold it."""
        return {
            **self._counters(),
            "left": self._rule.left,
            "done": self._is_done,
            "initial": {group.name: self._initial[group] for group in self.groups},
            "masked": {g.name: self._masked[g].nonzero().flatten().tolist() for g in self.groups},
            "channels": {group.name: group.channels for group in self.groups},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is another network's; nothing is taken then.
        """
        sizes = {group.name: group.channels for group in self.groups}
        known = state if isinstance(state, dict) else {}
        # States of before there was this entry have none.
        found = known.get("channels", sizes)
        if found != sizes:
            raise ValueError(f"{_OP}: state must be of {sizes} channels, got one of {found}")
        for name, dead in known.get("masked", {}).items():
            if name in sizes and max(dead, default=0) >= sizes[name]:
                raise ValueError(
                    f"{_OP}: state must be of {sizes[name]} channels of {name!r}, got one with "
                    f"channel {max(dead)}"
                )
        self._load_counters(state, [group.name for group in self.groups], "initial")
        self._rule.left, self._is_done = state["left"], bool(state["done"])
        for group in self.groups:
            self._initial[group] = float(state["initial"][group.name])
            masked = torch.zeros(group.channels, dtype=torch.bool)
            masked[state["masked"][group.name]] = True
            self._masked[group] = masked


def default_floor(channels: int) -> int:
    """Neurons that a group of so many keeps where nothing else is asked for."""
    return max(8, math.ceil(0.05 * channels))


def _check(
    alpha: float, first_layers: int, first_factor: float, floor: int | None, tied: str
) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{_OP}: alpha must be in [0, 1], got {alpha}")
    if first_layers < 0:
        raise ValueError(f"{_OP}: first_layers must not be negative, got {first_layers}")
    if not (math.isfinite(first_factor) and first_factor >= 0):
        raise ValueError(f"{_OP}: first_factor must not be negative, got {first_factor}")
    if floor is not None and floor < 1:
        raise ValueError(f"{_OP}: floor must be at least 1, got {floor}")
    if tied not in ("joint", "skip"):
        raise ValueError(f'{_OP}: tied must be "joint" or "skip", got {tied!r}')
