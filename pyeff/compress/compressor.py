"""Training, removal and factorisation put together: ``Compressor``."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.compress.factorize import factorize_with_report
from pyeff.compress.factorize_report import FactorizeReport
from pyeff.compress.group_sparsity import GroupSparsity
from pyeff.compress.layer_calls import Example, arguments_of
from pyeff.compress.low_rank import LowRank
from pyeff.compress.rank_rules import RankRule
from pyeff.compress.scale_free import KeptScale, scale_free_layers
from pyeff.compress.shrink import shrink_with_report
from pyeff.compress.shrink_report import ShrinkReport

_OP = "Compressor"
# Without a target: what compression-aware training is usually given.
ENERGY = 0.9
# A layer that keeps less of its singular values is another layer.
_LEAST_ENERGY, _STEPS = 0.05, 24
# Factorisations that are tried where their size was guessed too small.
_TRIES = 6
_SHRINK_OPTIONS = ("constants", "round_to", "threshold")
_FACTORIZE_OPTIONS = ("form", "only_if", "layers")


@dataclass(frozen=True)
class Compressed:
    """A network that was made smaller.

    Attributes:
        model: the new network, in the mode of the old one; ``config`` describes it where the old
            one had a ``config``.
        parameters: how many the network had at the start, and how many this one has.
        removal: what became of its channels; ``None`` where none were looked at.
        factors: what became of its layers; ``None`` where none were factored.
        energy: share of the sum of the singular values that factored layers keep.
    """

    model: nn.Module
    parameters: tuple[int, int]
    removal: ShrinkReport | None
    factors: FactorizeReport | None
    energy: float | None

    @torch.no_grad()
    def carry_optimizer(
        self, before: nn.Module, old: torch.optim.Optimizer, new: torch.optim.Optimizer
    ) -> None:
        """Takes over an optimiser's state: that of kept channels, and step counts.

        The two layers in a factored one's place start without a state.

        Args:
            before: the network of ``old``.
            old: an optimiser over its parameters.
            new: one of the same kind over the new network's; its state is set.

        Raises:
            ValueError: a state whose shape is not its parameter's.
        """
        names = {name: parameter for name, parameter in before.named_parameters()}
        for name, parameter in self.model.named_parameters():
            state = old.state.get(names[name]) if name in names else None
            if state is None:
                continue
            new.state[parameter] = {
                key: self._carried(name, value, names[name], parameter)
                for key, value in state.items()
            }

    def _carried(self, name: str, value: Any, before: Tensor, after: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != before.shape:
            # Step counts; the same object must not belong to two optimisers.
            return value.clone() if isinstance(value, Tensor) else value
        kept = value if self.removal is None else self.removal.carry(name, value)
        if kept.shape != after.shape:
            raise ValueError(
                f"{_OP}: the optimiser's state of {name} must have its parameter's shape "
                f"{list(after.shape)}, got {list(kept.shape)}"
            )
        return torch.empty_like(after, requires_grad=False).copy_(kept)

    def to_json(self) -> dict[str, Any]:
        """Sizes before and after as a JSON-able document."""
        removal, factors = self.removal, self.factors
        return {
            "parameters": list(self.parameters),
            "energy": self.energy,
            "channels": {n: list(c) for n, c in removal.channels.items()} if removal else {},
            "removal_difference": removal.difference if removal else None,
            "factored": {
                layer.name: {"rank": layer.rank, "of": len(layer.values), "form": layer.form}
                for layer in (factors.layers if factors else ())
                if layer.factored
            },
            "factors_difference": factors.difference if factors else None,
        }

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"compressed: {before:,} -> {after:,} parameters ({after / before:.1%})"]
        lines += [str(part) for part in (self.removal, self.factors) if part is not None]
        return "\n".join(lines)


class Compressor:
    """Lets a network learn its own size while it trains, then makes it smaller for real.

    Give the optimiser once (:meth:`attach`), call :meth:`after_step` after each of its steps and
    :meth:`end_epoch` at the end of every epoch. :meth:`compress` returns the smaller network
    whenever it is wanted: after the training, or in its middle to train on with it ("reload").

    Both penalties act between the optimiser's steps, low rank first, then group sparsity. Scaling
    rows cannot raise a rank, and cutting singular values keeps zero rows zero, so that what both
    have made survives.

    Batch norms hide in training how short the filters before them have become; their running
    statistics do not know yet. Take them anew (:func:`pyeff.train.calibrate`) before the network is
    evaluated or compressed, as ``pyeff train`` does.

    Args:
        model: the network that is trained, not wrapped.
        example: its input, a tensor or several; one image is enough.
        group: finds the neurons that are not needed; ``None`` looks for none.
        rank: draws weights to low rank; ``None`` does not.
        energy: share of the sum of its singular values that a factored layer keeps, in (0, 1].
            ``None``: the largest one with which ``target_params`` is met, for a form other than
            ``"channel"`` or a condition other than ``"macs"`` one near it; without a target 0.9
            if there is a ``rank``, and nothing is factored otherwise.
        target_params: share of the parameters that may be left, in (0, 1).
        keep_scale: whether layers that only a batch norm reads keep the mean length of their live
            filters when a penalty shortens them. What the network computes is the same; but the
            norm lets gradients grow as 1 / length, and filters of a tenth of their length are
            turned a hundred times as fast. Not with a ``group`` that includes the norms.
        options: ``constants``, ``round_to``, ``threshold`` of :func:`pyeff.compress.shrink`, and
            ``form``, ``only_if``, ``layers`` of :func:`pyeff.compress.factorize`. The form is
            ``"channel"`` by default: that of the matrix whose rank ``rank`` lowers.

    Raises:
        ValueError: neither ``group`` nor ``rank``, one of another network, or a value out of range.

    Source: Alvarez, Salzmann, "Learning the Number of Neurons in Deep Networks", NIPS 2016, and
    "Compression-aware Training of Deep Networks", NIPS 2017.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> x = torch.randn(2, 3, 9, 9)
        >>> compressor = Compressor(model, x, group=GroupSparsity(model, x, strength=0.1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> compressor.attach(optimizer)
        >>> for epoch in range(2):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     compressor.after_step(lr=0.1)
        ...     compressor.end_epoch(lr=0.1)
        >>> small = compressor.compress()
        >>> small.model(x).shape
        torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        group: GroupSparsity | None = None,
        rank: LowRank | None = None,
        energy: float | None = None,
        target_params: float | None = None,
        keep_scale: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if group is None and rank is None:
            raise ValueError(f"{_OP}: group or rank must be given, got neither")
        for name, penalty in (("group", group), ("rank", rank)):
            if penalty is not None and penalty.model is not model:
                raise ValueError(f"{_OP}: {name} must be of the model, got one of another")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"{_OP}: energy must be in (0, 1], got {energy}")
        if target_params is not None and not 0 < target_params < 1:
            raise ValueError(f"{_OP}: target_params must be in (0, 1), got {target_params}")
        known = (*_SHRINK_OPTIONS, *_FACTORIZE_OPTIONS)
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(f"{_OP}: options must be among {', '.join(known)}, got {unknown}")
        self.model, self.example = model, example
        self.group, self.rank = group, rank
        self.energy, self.target_params = energy, target_params
        self.options = {"form": "channel", **(options or {})}
        self.parameters = _count(model)
        self._optimizer: torch.optim.Optimizer | None = None
        inputs = arguments_of(example)
        with_norms = group is not None and any(g.include_norm for g in group.groups)
        free = keep_scale and not with_norms
        self._kept = KeptScale(model, scale_free_layers(model, inputs) if free else {})

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Tells both penalties which optimiser trains the model.

        Args:
            optimizer: SGD, Adam or AdamW over the model's parameters.

        Raises:
            TypeError, ValueError: as the penalties' own ``attach``.
        """
        for penalty in self._penalties():
            penalty.attach(optimizer)
        self._optimizer = optimizer

    def after_step(self, lr: float) -> None:
        """To be called after every step of the optimiser.

        Args:
            lr: the current learning rate.
        """
        with self._keeping(any(penalty.due_after_step for penalty in self._penalties())):
            for penalty in self._penalties():
                penalty.after_step(lr)

    def end_epoch(self, lr: float) -> None:
        """To be called at the end of every epoch.

        Args:
            lr: the current learning rate.
        """
        with self._keeping(True):
            for penalty in self._penalties():
                penalty.end_epoch(lr)

    @contextlib.contextmanager
    def _keeping(self, due: bool) -> Iterator[None]:
        before = self._kept.lengths() if due else {}
        yield
        if before and self._optimizer is not None:
            self._kept.restore(before, self._optimizer)

    def _penalties(self) -> tuple[GroupSparsity | LowRank, ...]:
        """Low rank first: see the class."""
        return tuple(p for p in (self.rank, self.group) if p is not None)

    def statistics(self) -> dict[str, Any]:
        """Live neurons by group and ranks by layer, as each penalty's ``statistics`` has them."""
        found: dict[str, Any] = {}
        if self.group is not None:
            found["group"] = self.group.statistics()
        if self.rank is not None:
            found["rank"] = self.rank.statistics()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model and the optimiser."""
        return {
            "group": None if self.group is None else self.group.state_dict(),
            "rank": None if self.rank is None else self.rank.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: the state is of other penalties.
        """
        penalties = {"group": self.group, "rank": self.rank}
        # All of it is looked at before any of it is taken.
        for name, penalty in penalties.items():
            found = state.get(name)
            if (found is None) != (penalty is None):
                raise ValueError(
                    f"{_OP}: state must have a {name} as the compressor has, got "
                    f"{'none' if found is None else 'one'}"
                )
        for name, penalty in penalties.items():
            if penalty is not None:
                penalty.load_state_dict(state[name])

    def compress(self, model: nn.Module | None = None) -> Compressed:
        """The network without its dead neurons and with its layers of low rank factored.

        Args:
            model: a copy of the compressor's model with the same names; by default that model. It
                is not changed.

        Returns:
            The new network and what was done.

        Raises:
            ValueError: as :func:`pyeff.compress.shrink` and :func:`pyeff.compress.factorize`.

        Warns:
            UserWarning: more is left than ``target_params`` allows.
        """
        small = self.model if model is None else model
        removal, factors = None, None
        if self.group is not None:
            chosen = {k: v for k, v in self.options.items() if k in _SHRINK_OPTIONS}
            small, removal = shrink_with_report(small, self.example, **chosen)
        energy = self.energy
        if energy is not None or self.rank is not None:
            if energy is None and self.target_params is not None:
                small, factors, energy = self._factorized_to_target(small)
            else:
                energy = ENERGY if energy is None else energy
                small, factors = self._factorized(small, energy)
        self._warn_if_missed(_count(small))
        return Compressed(small, (self.parameters, _count(small)), removal, factors, energy)

    @property
    def _most(self) -> int:
        """Parameters that may be left."""
        return int((self.target_params or 1.0) * self.parameters)

    def _warn_if_missed(self, left: int) -> None:
        if self.target_params is not None and left > self._most:
            warnings.warn(
                f"{_OP}: target_params {self.target_params:g} allows {self._most:,} parameters, "
                f"got {left:,}: neither dead channels nor ranks give more",
                stacklevel=3,
            )

    def _factorized(self, model: nn.Module, energy: float) -> tuple[nn.Module, FactorizeReport]:
        chosen = {k: v for k, v in self.options.items() if k in _FACTORIZE_OPTIONS}
        return factorize_with_report(model, RankRule(energy=energy), example=self.example, **chosen)

    def _factorized_to_target(self, model: nn.Module) -> tuple[nn.Module, FactorizeReport, float]:
        """Factored with the largest energy with which the target is met, or the least."""
        energy = self._guessed_energy(model)
        made, report = self._factorized(model, energy)
        if _count(made) <= self._most or energy == _LEAST_ENERGY:
            return made, report, energy
        # The guess takes the forms of full rank, and every pair of fewer weights for taken.
        low, high, best = _LEAST_ENERGY, energy, _LEAST_ENERGY
        for _ in range(_TRIES):
            middle = (low + high) / 2
            if _count(self._factorized(model, middle)[0]) <= self._most:
                low = best = middle
            else:
                high = middle
        return *self._factorized(model, best), best

    def _guessed_energy(self, model: nn.Module) -> float:
        """The largest energy with which the target is met by the spectra alone, or the least."""
        _, report = self._factorized(model, 1.0)
        now = _count(model)
        if _left(report, 1.0, now) <= self._most:
            return 1.0
        low, high = _LEAST_ENERGY, 1.0
        if _left(report, low, now) > self._most:
            return low
        for _ in range(_STEPS):
            middle = (low + high) / 2
            fits = _left(report, middle, now) <= self._most
            low, high = (middle, high) if fits else (low, middle)
        return low


def _left(report: FactorizeReport, energy: float, parameters: int) -> int:
    """Parameters of the network if its layers were factored with another energy."""
    rule = RankRule(energy=energy)
    for layer in report.layers:
        if not layer.values or layer.rank is None or layer.params_after is None:
            continue
        values = torch.tensor(layer.values, dtype=torch.float64)
        rank = rule.of(layer.name, values, layer.floor)
        # Rank r has r weights for every row and column of the matrix; biases stay.
        weights = torch.Size(layer.shape).numel()
        bias = layer.params - weights
        pair = (layer.params_after - bias) // layer.rank * (rank or 0)
        parameters -= max(0, weights - pair)
    return parameters


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
