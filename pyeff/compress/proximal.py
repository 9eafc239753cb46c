"""When a proximal step is due and how large it is: what the regularisers have in common."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam)  # AdamW is an Adam
_Unit = TypeVar("_Unit")


class Proximal:
    """A penalty that acts between the optimiser's steps, with exact zeros.

    Args:
        model: the network, not wrapped.
        every: ``"epoch"``, or a number of steps; a step of that kind is the share of an epoch's
            that keeps their sum equal.
        steps_per_epoch: needed for a number of steps.
        schedule: learning rates of the epochs in which the target shall be reached, one each.

    Raises:
        ValueError: numbers that are not positive, or a missing ``steps_per_epoch``.
    """

    def __init__(
        self,
        model: nn.Module,
        every: str | int,
        steps_per_epoch: int | None,
        schedule: Sequence[float] | None,
    ) -> None:
        self._op = type(self).__name__
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f'{self._op}: every must be "epoch" or a positive number of steps, got {every!r}'
            )
        if every != "epoch" and (steps_per_epoch is None or steps_per_epoch < 1):
            raise ValueError(
                f"{self._op}: steps_per_epoch must be positive where every counts steps, got "
                f"{steps_per_epoch}"
            )
        if schedule is not None and not (
            len(schedule) > 0 and all(math.isfinite(t) and t >= 0 for t in schedule)
        ):
            raise ValueError(
                f"{self._op}: schedule must hold learning rates that are not negative, got "
                f"{list(schedule)}"
            )
        self.model = model
        self.every, self.steps_per_epoch = every, steps_per_epoch
        self.schedule = None if schedule is None else tuple(float(t) for t in schedule)
        self.epochs = self.steps = 0
        self.strength_used = 0.0
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Tells which optimiser trains the model: its momentum is cleared, its metric used.

        Args:
            optimizer: SGD, Adam or AdamW over the model's parameters.

        Raises:
            TypeError: another kind.
            ValueError: it lacks a parameter that the penalty acts on.
        """
        if not isinstance(optimizer, _OPTIMIZERS):
            raise TypeError(
                f"{self._op}: optimizer must be SGD, Adam or AdamW, got {type(optimizer).__name__}"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(self.model.named_parameters())
        for name in self._penalised():
            if id(parameters[name]) not in held:
                raise ValueError(f"{self._op}: optimizer must hold {name}, got one without it")
        self._optimizer = optimizer

    @property
    def due_after_step(self) -> bool:
        """Whether the next :meth:`after_step` applies the penalty."""
        return isinstance(self.every, int) and (self.steps + 1) % self.every == 0

    def after_step(self, lr: float) -> None:
        """To be called after every step of the optimiser.

        Args:
            lr: the current learning rate.

        Raises:
            RuntimeError: no optimiser is attached.
        """
        self._check_attached()
        self.steps += 1
        if isinstance(self.every, int) and self.steps % self.every == 0:
            self._run(lr, self.every)
        self._hold()

    def end_epoch(self, lr: float) -> None:
        """To be called at the end of every epoch.

        Args:
            lr: the current learning rate.

        Raises:
            RuntimeError: no optimiser is attached.
        """
        self._check_attached()
        if self.every == "epoch":
            self._apply(lr, self._ahead(lr, lr, 1.0))
        elif isinstance(self.every, int) and self.steps % self.every:
            self._run(lr, self.steps % self.every)
        self._hold()
        self.epochs, self.steps = self.epochs + 1, 0

    def _check_attached(self) -> None:
        if self._optimizer is None:
            raise RuntimeError(f"{self._op}: attach must be called before training, got no call")

    def _run(self, lr: float, steps: int) -> None:
        per_epoch = self.steps_per_epoch or 1
        step = lr * steps / per_epoch
        self._apply(step, self._ahead(step, lr, self.steps / per_epoch))

    def _ahead(self, step: float, lr: float, done: float) -> float:
        """T: the sum of the steps to come, this one included."""
        schedule = self.schedule or ()
        if self.epochs >= len(schedule):
            return step
        return step + lr * max(0.0, 1 - done) + sum(schedule[self.epochs + 1 :])

    def _penalised(self) -> Iterable[str]:
        """Names of the parameters that the penalty acts on."""
        raise NotImplementedError("Proximal: _penalised is what a subclass brings")

    def _apply(self, step: float, ahead: float) -> None:
        """One proximal step of size ``step``."""
        raise NotImplementedError("Proximal: _apply is what a subclass brings")

    def _hold(self) -> None:
        """What must hold after every step of the optimiser."""

    def _state(self, key: str) -> dict[str, Tensor]:
        """A buffer of the optimiser by the names of the parameters that have it."""
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        states = ((name, optimizer.state.get(p, {})) for name, p in self.model.named_parameters())
        return {name: state[key] for name, state in states if state.get(key) is not None}

    def _metric(self) -> dict[str, Tensor] | None:
        """Adam's ``sqrt(v) + eps`` by parameter that it has taken a step on, None for SGD."""
        optimizer = self._optimizer
        if not isinstance(optimizer, torch.optim.Adam):
            return None
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if id(parameter) in names and "exp_avg_sq" in state:
                    key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
                    correction = 1 - float(group["betas"][1]) ** float(state["step"])
                    variance = state[key].double() / correction
                    found[names[id(parameter)]] = variance.sqrt() + float(group["eps"])
        return found

    def _stepped(
        self, units: Mapping[_Unit, Sequence[str]], metric: Mapping[str, Tensor] | None
    ) -> list[_Unit]:
        """The layers or groups that can be moved: those with a metric, all for SGD.

        A part that no loss reaches yet, as a head that is not used, has none.

        Args:
            units: names of the parameters of each.
            metric: what :meth:`_metric` gave.

        Raises:
            ValueError: Adam has not taken a step on any of them.
        """
        if metric is None:
            return list(units)
        found = [unit for unit, names in units.items() if all(name in metric for name in names)]
        if not found:
            missing = next(name for names in units.values() for name in names if name not in metric)
            raise ValueError(
                f"{self._op}: optimizer must have taken a step before the penalty acts, got none "
                f"on {missing}"
            )
        return found

    def _check_within_reach(self, left: int, most: int, passed: Sequence[str]) -> None:
        """Raises where layers that are passed over keep more than a target allows.

        The others would otherwise be cut down to their floors, and in vain.

        Args:
            left: parameters that are left at the least.
            most: what may be left.
            passed: the layers that have taken no step.
        """
        if passed and left > most:
            raise ValueError(
                f"{self._op}: optimizer must have taken a step on enough layers to leave {most} "
                f"parameters, got {left} left without {', '.join(passed)}"
            )

    def _counters(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "steps": self.steps, "strength": self.strength_used}

    def _load_counters(self, state: dict[str, Any], names: Sequence[str], key: str) -> None:
        """Restores :meth:`_counters` of a state about the layers called ``names``."""
        if not isinstance(state, dict) or list(state.get(key, {})) != list(names):
            raise ValueError(f"{self._op}: state must be of the same layers, got another penalty's")
        self.epochs, self.steps = int(state["epochs"]), int(state["steps"])
        self.strength_used = float(state["strength"])
