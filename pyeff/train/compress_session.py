"""One process's part of a training in which the network learns its own size."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff import models
from pyeff.checkpoint import config_differences, model_config, read_archive
from pyeff.compress import Compressor, GroupSparsity, LowRank
from pyeff.train.batches import normalise
from pyeff.train.compress_options import GROUP_OPTIONS
from pyeff.train.processes import Processes
from pyeff.train.progress_bar import Bar
from pyeff.train.session import Batches, Session, TrainResult

if TYPE_CHECKING:
    from pyeff.train.trainer import Trainer

_GROUP = (*GROUP_OPTIONS, "every")
_RANK = ("every",)
# Of training images, for batch norm's statistics after a step of the penalties.
_BATCHES = 8
_SMALLER = ("form", "only_if", "constants", "round_to")


class CompressSession(Session):
    """A :class:`Session` with a :class:`~pyeff.compress.Compressor`.

    Penalties act at the end of an epoch, and batch norms' running statistics are taken anew after
    them. At the end of ``reload_epoch`` (or of the last) the network is replaced by the smaller
    one, the optimiser's momenta of what is left are carried over, and the training goes on without
    penalties. The first process makes the smaller network and gives it to the others.
    """

    def __init__(self, trainer: "Trainer", processes: Processes) -> None:
        super().__init__(trainer, processes)
        self.last_epoch = self.config.reload_epoch or self.config.epochs
        self.compressor: Compressor | None = self._compressor()
        self.compressor.attach(self.optimizer)
        self.compressed: dict[str, Any] | None = None
        self._seen: dict[str, Any] | None = None

    def _compressor(self) -> Compressor:
        """The penalties as the run's settings ask for them."""
        config, example = self.config, self._example()
        chosen = dict(config.compress or {})
        strengths = [chosen[name] for name in ("group", "rank") if name in chosen]
        # Two penalties share the way to the target; what is missing the ranks bring at the end.
        target = config.target_params
        each = None if target is None else target ** (1 / len(strengths))
        rates = [
            self._learning_rate(epoch * self.trainer.steps_per_epoch - 1)
            for epoch in range(1, self.last_epoch + 1)
        ]

        def common(name: str) -> dict[str, Any]:
            return {
                "strength": chosen[name],
                "target_params": each if chosen[name] == "auto" else None,
                "schedule": rates,
                "steps_per_epoch": self.trainer.steps_per_epoch,
            }

        group = rank = None
        if "group" in chosen:
            options = {k: chosen[k] for k in _GROUP if k in chosen}
            group = GroupSparsity(self.model, example, **common("group"), **options)
        if "rank" in chosen:
            options = {k: chosen[k] for k in _RANK if k in chosen}
            rank = LowRank(self.model, **common("rank"), **options)
        return Compressor(
            self.model,
            example,
            group=group,
            rank=rank,
            energy=config.energy,
            target_params=target,
            keep_scale=chosen.get("keep_scale", True),
            options={k: chosen[k] for k in _SMALLER if k in chosen},
        )

    def _example(self) -> Tensor:
        (task,) = self.tasks
        images = normalise(task.train_images[:1], task.mean, task.std)
        return images.to(self.device, self.dtype)

    def _update(self, batches: Batches, levels: list[int], step: int) -> Tensor:
        losses = super()._update(batches, levels, step)
        if self.compressor is not None:
            self.compressor.after_step(self._learning_rate(step))
        return losses

    def _end_epoch(self, bar: Bar) -> None:
        if self.compressor is not None:
            began = time.perf_counter()
            self.compressor.end_epoch(self._learning_rate(self.progress.step - 1))
            # Every process has done the same; rounding on another machine must not part them.
            self.processes.copy(list(self.model.parameters()))
            self._seen = self.compressor.statistics()
            self._renew_statistics()
            if self.progress.step == self.last_epoch * self.trainer.steps_per_epoch:
                self._reload(self.compressor, bar)
            self.progress.seconds += time.perf_counter() - began
        super()._end_epoch(bar)

    def _reload(self, compressor: Compressor, bar: Bar) -> None:
        """Replaces the network by the smaller one."""
        before, optimizer = self.model, self.optimizer
        self.processes.copy_buffers(before)
        made = self.processes.by_first(lambda: compressor.compress(self._plain_copy()))
        document = self.processes.document(
            None
            if made is None
            else {"model": model_config(made.model), "compressed": made.to_json()}
        )
        self.take(models.build(document["model"]) if made is None else made.model)
        if made is not None:
            made.carry_optimizer(before, optimizer, self.optimizer)
        self.processes.copy([*self.model.parameters(), *self.model.buffers()])
        self._share_momenta()
        self.model.train()
        self._renew_statistics()
        self.compressor, self.compressed = None, document["compressed"]
        count, left = document["compressed"]["parameters"]
        bar.say(f"reload: {count:,} -> {left:,} parameters ({left / count:.1%})")

    def _renew_statistics(self) -> None:
        """Batch norm's running statistics for the weights as they are now.

        Those of the weights before the penalties' step are of no use: filters are shorter by a
        good part now, and what a dead one's norm puts out is folded into the layers after it.
        """
        if any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            self.calibrate(self.config.calibrate or _BATCHES)

    def _plain_copy(self) -> nn.Module:
        """The network with its own batch norms, which wait for no other process."""
        plain = models.build(model_config(self.model)).to(self.device, self.dtype)
        plain.load_state_dict(self.model.state_dict())
        return plain

    def _share_momenta(self) -> None:
        """Gives every process the optimiser's momenta of the first."""
        if self.processes.ranks == 1:
            return
        parameters, state = dict(self.model.named_parameters()), self.optimizer.state
        names = [n for n, p in parameters.items() if "momentum_buffer" in state.get(p, {})]
        for name in self.processes.document(names):
            parameter = parameters[name]
            if not self.processes.first:
                state[parameter]["momentum_buffer"] = torch.empty_like(
                    parameter, requires_grad=False
                )
            self.processes.copy([state[parameter]["momentum_buffer"]])

    def _records(self, epoch: int, evaluated: bool) -> list[dict[str, Any]]:
        records = super()._records(epoch, evaluated)
        about: dict[str, Any] = {"parameters": sum(p.numel() for p in self.model.parameters())}
        if self._seen is not None:
            about |= self._seen
            self._seen = None
        for record in records:
            record["compression"] = about
        return records

    def _meta(self) -> dict[str, Any]:
        state = None if self.compressor is None else self.compressor.state_dict()
        return {**super()._meta(), "compressor": state, "compressed": self.compressed}

    def restore(self) -> None:
        """Takes up the run, before the reload or after it."""
        _, meta = read_archive(self.trainer.checkpoint)
        if meta.get("compressed") is not None:
            # Not to be told from the model: a reload that found nothing to do leaves it as it was.
            config = meta["model"]
            differences = config_differences(_base(config), _base(model_config(self.model)))
            if differences:
                raise ValueError(
                    f"resume: {self.trainer.checkpoint} must be of the same model, got: "
                    + "; ".join(differences)
                )
            self.compressor, self.compressed = None, meta["compressed"]
            self.take(models.build(config))
        super().restore()
        if self.compressor is not None:
            self.compressor.load_state_dict(meta["compressor"])

    def run(self) -> TrainResult:
        """Steps to the end; the network is the smaller one then."""
        return replace(super().run(), compressed=self.compressed)


def _base(config: dict[str, Any]) -> dict[str, Any]:
    """Of a compressed network, the configuration that it was made of."""
    found: dict[str, Any] = config["base"] if config.get("family") == "compressed" else config
    return found


def layer_counts(
    records: Sequence[dict[str, Any]], what: str, number: str
) -> dict[int, dict[str, int]]:
    """How a number of each layer went with the epochs.

    Args:
        records: lines of ``metrics.jsonl``.
        what: ``"group"`` or ``"rank"``.
        number: of its statistics, such as ``"live"`` or ``"ranks"``.

    Returns:
        Epoch to layer to the number; only epochs before the reload.
    """
    return {
        record["epoch"]: dict(record["compression"][what][number])
        for record in records
        if what in record.get("compression", {})
    }
