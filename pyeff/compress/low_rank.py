"""Low rank: the matrix of every layer loses singular values while the network trains."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress.expanded import refuse_expanded
from pyeff.compress.factor_forms import shared_weights, why_left
from pyeff.compress.parameter_count import ParameterCount
from pyeff.compress.prox import ROUTES, shrink_spectrum, singular_values
from pyeff.compress.proximal import Proximal
from pyeff.compress.rank_rules import noise_floor
from pyeff.compress.strength import (
    TargetRule,
    check_factors,
    check_strength,
    check_target,
    level_for_count,
)

_OP = "LowRank"

# Without a target: the run lowers the singular values by so many medians of the start's.
_DOSE = 0.5


class LowRank(Proximal):
    """The nuclear norm of every layer's matrix as a penalty, by proximal steps.

    The matrix ``[C_out, C_in * kernel]`` of a convolution or linear layer has a filter in each row;
    biases are left alone. After the optimiser's steps on the loss alone its singular values are
    lowered by ``t tau_l``, t the learning rate; those that are smaller vanish, which leaves a
    matrix that :func:`~pyeff.compress.factorize` splits at no loss. Together with
    :class:`GroupSparsity` it comes first: its step keeps rows of zeros, and rows that are scaled
    keep the rank.

    With strength ``"auto"`` tau_l is s times the median singular value of the layer at the start.
    Without a target ``s = 0.5 / (sum of the learning rates of schedule)``. With ``target_params`` s
    is found anew at every application, so that the network, factored at the ranks that the end of
    ``schedule`` finds, meets the target: ``s = L / T + G / t``, L the level up to which singular
    values must vanish, T the sum of the learning rates to come, G what the data gave back since the
    last application. After the end the target is held.

    Every layer keeps its ``floor`` largest singular values: one that would vanish stays as it is.

    With Adam a layer's step is divided by the mean of its metric (``sqrt(v) + eps``): singular
    values have no metric for every parameter. Layers that it has not moved yet are passed over.

    Args:
        model: the network, not wrapped in DistributedDataParallel.
        strength: tau, not negative, or ``"auto"``.
        layers: factors of the penalty for layers by name, 1 for those not named.
        floor: the rank that every layer keeps.
        every, steps_per_epoch: as in :class:`GroupSparsity`. An application costs a singular value
            decomposition of every layer.
        route: how it is computed, as in :func:`~pyeff.compress.shrink_singular_values`.
        target_params: share of the network's parameters to be kept, in (0, 1].
        schedule: the learning rate of each epoch; needed for ``"auto"``.

    Attributes:
        layers: names of the layers that are penalised: all convolutions of one group and linear
            layers whose matrix has two rows and columns at least, but for those that
            :func:`factorize` leaves as they are and those whose weight takes no gradient.
        left_out: for the latter two the reason.

    Raises:
        TypeError, ValueError: numbers out of range, unknown layers, no layer at all, a target that
            the floor does not allow, expanded layers.

    Source: Alvarez, Salzmann, "Compression-aware Training of Deep Networks", NIPS 2017.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> low_rank = LowRank(net, strength=0.5)
        >>> low_rank.attach(torch.optim.SGD(net.parameters(), lr=0.1))
        >>> low_rank.end_epoch(lr=0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | str = "auto",
        layers: Mapping[str, float] | None = None,
        floor: int = 1,
        every: str | int = "epoch",
        steps_per_epoch: int | None = None,
        route: str = "auto",
        target_params: float | None = None,
        schedule: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, every, steps_per_epoch, schedule)
        refuse_expanded(_OP, model)
        check_strength(_OP, strength)
        check_target(_OP, target_params, strength)
        if not isinstance(floor, int) or floor < 1:
            raise ValueError(f"{_OP}: floor must be a whole number of at least 1, got {floor}")
        if route not in ROUTES:
            allowed = ", ".join(map(repr, ROUTES))
            raise ValueError(f"{_OP}: route must be one of {allowed}, got {route!r}")
        if strength == "auto" and not sum(schedule or ()):
            raise ValueError(
                f'{_OP}: schedule must have a learning rate above 0 for strength "auto", got '
                f"{schedule}"
            )
        matrices = {name: module for name, module in model.named_modules() if _has_matrix(module)}
        self.left_out = _left_out(model, matrices)
        fit = {n: module for n, module in matrices.items() if n not in self.left_out}
        check_factors(_OP, layers, list(fit))
        self._factor = {name: float((layers or {}).get(name, 1.0)) for name in fit}
        self.layers = tuple(name for name in fit if self._factor[name] > 0)
        if not self.layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise ValueError(
                f"{_OP}: model must have convolutions of one group or linear layers, got none that "
                f"can be penalised{why and ': '}{why}"
            )
        self._modules = {name: fit[name] for name in self.layers}
        self.strength, self.route, self.target_params = strength, route, target_params
        self.floor = floor
        self._rule = TargetRule()
        self._count = ParameterCount(model)
        self._check_reachable()
        self._initial = {
            name: float(self._typical(name)) if strength == "auto" else 1.0 for name in self.layers
        }
        self._ranks = {name: min(_matrix(self._weight(name)).shape) for name in self.layers}

    def _check_reachable(self) -> None:
        if self.target_params is None:
            return
        least = self._count.after(ranks=dict.fromkeys(self.layers, self.floor))
        if least > self.target_params * self._count.total:
            raise ValueError(
                f"{_OP}: target_params must be at least {least / self._count.total:.4f}, which "
                f"rank {self.floor} of every layer and what is not penalised keep, got "
                f"{self.target_params}"
            )

    def _weight(self, name: str) -> Tensor:
        """``[C_out, ...]``."""
        module = self._modules[name]
        weight = module.get_parameter("weight")
        transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
        return weight.detach().transpose(0, 1) if transposed else weight.detach()

    def _values(self, name: str) -> Tensor:
        return singular_values(_matrix(self._weight(name)), route=self.route).double().cpu()

    def _typical(self, name: str) -> Tensor:
        """The median singular value of those that are more than rounding."""
        values = self._values(name)
        real = values[values > self._noise(name, values)]
        return real.median() if len(real) else values[0]

    def _noise(self, name: str, values: Tensor) -> float:
        weight = self._weight(name)
        rows, columns = _matrix(weight).shape
        return noise_floor(values, (rows, columns), weight.dtype)

    def _penalised(self) -> Iterable[str]:
        return [f"{name}.weight" if name else "weight" for name in self.layers]

    def _step_of(self, name: str, metric: float) -> float:
        """How far a step of one times the strength lowers the singular values."""
        if self.strength == "auto":
            return self._factor[name] * self._initial[name]
        return self._factor[name] / metric

    @torch.no_grad()
    def _apply(self, step: float, ahead: float) -> None:
        if step <= 0:
            return
        found = self._metric()
        keys = dict(zip(self.layers, self._penalised(), strict=True))
        moved = self._stepped({name: [key] for name, key in keys.items()}, found)
        metric = {name: 1.0 if found is None else float(found[keys[name]].mean()) for name in moved}
        per_strength = {name: self._step_of(name, metric[name]) for name in moved}
        self.strength_used = self._strength_for(per_strength, step, ahead)
        for name in moved:
            weight = self._weight(name)
            tau = step * self.strength_used * per_strength[name]
            if tau <= 0:
                continue
            shrunk, values = shrink_spectrum(
                _matrix(weight), tau, route=self.route, floor=self.floor
            )
            weight.copy_(shrunk.reshape(weight.shape))
            left = values.double().cpu().sort(descending=True).values
            self._ranks[name] = max(int((left > self._noise(name, left)).sum()), self.floor)

    def _strength_for(self, per_strength: dict[str, float], step: float, ahead: float) -> float:
        if not isinstance(self.strength, str):
            return float(self.strength)
        if self.target_params is None:
            return _DOSE / sum(self.schedule or ())
        levels = {}
        for name, per_one in per_strength.items():
            if per_one > 0:
                values = self._values(name)
                real = values > self._noise(name, values)
                levels[name] = torch.where(real, values, 0.0) / per_one
        if not levels:  # All weights are zero.
            return 0.0

        def count(level: float) -> int:
            ranks = {n: max(int((found > level).sum()), self.floor) for n, found in levels.items()}
            return self._count.after(ranks=ranks)

        most = int(self.target_params * self._count.total)
        level = level_for_count(torch.cat(list(levels.values())), count, most)
        passed = [name for name in self.layers if name not in per_strength]
        self._check_within_reach(count(level), most, passed)
        return self._rule.strength(level, step, ahead)

    def ranks(self, energy: float = 1.0) -> dict[str, int]:
        """The rank of every layer, from its weights as they are.

        Args:
            energy: in (0, 1]: the smallest rank whose singular values are that share of the sum of
                all (the sum of the values, not of their squares); for 1 all that are above
                rounding.

        Raises:
            ValueError: an energy out of range.
        """
        if not 0 < energy <= 1:
            raise ValueError(f"{_OP}: energy must be in (0, 1], got {energy}")
        found = {}
        for name in self.layers:
            values = self._values(name)
            if energy == 1:
                noise = torch.finfo(self._weight(name).dtype).eps * max(
                    _matrix(self._weight(name)).shape
                )
                found[name] = int((values > noise * values[0]).sum())
            else:
                sums = values.cumsum(0)
                found[name] = int((sums < energy * sums[-1]).sum()) + 1
        return found

    def statistics(self) -> dict[str, Any]:
        """How far it has come.

        Returns:
            ``ranks``: singular values that the last application left, by layer; ``full``: how many
            there can be; ``params``: parameters of the network factored at these ranks, where that
            is fewer; ``share`` of all; ``strength`` of the last application.
        """
        params = self._count.after(ranks=self._ranks)
        return {
            "ranks": dict(self._ranks),
            "full": {name: min(_matrix(self._weight(name)).shape) for name in self.layers},
            "params": params,
            "share": params / self._count.total,
            "strength": self.strength_used,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly, as JSON can hold it."""
        return {
            **self._counters(),
            "left": self._rule.left,
            "initial": dict(self._initial),
            "ranks": dict(self._ranks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is another network's.
        """
        self._load_counters(state, self.layers, "initial")
        self._rule.left = state["left"]
        self._initial = {name: float(state["initial"][name]) for name in self.layers}
        self._ranks = {name: int(state["ranks"][name]) for name in self.layers}


def _left_out(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why some layers with a matrix are not penalised."""
    shared, reasons = shared_weights(model), {}
    for name, layer in layers.items():
        reason = why_left(layer, name in shared)
        if reason is None and not layer.get_parameter("weight").requires_grad:
            reason = "its weight takes no gradient"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        shape = (module.out_channels, module.in_channels * math.prod(module.kernel_size))
    else:
        return False
    return min(shape) > 1 and isinstance(module._parameters.get("weight"), nn.Parameter)


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1)
