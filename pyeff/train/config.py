"""Everything that decides a training run, in one object that a checkpoint can keep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pyeff.train.compress_options import check_compress

_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("multistep", "thirds", "cosine", "onecycle", "constant"),
    "weight_decay_on": ("factors", "product"),
    "level_rule": ("sum", "sandwich"),
    "task_rule": ("joint", "alternate"),
    "precision": ("fp32", "bf16", "fp64"),
    "partition_method": ("greedy", "assignment"),
    "branch_mean": ("batch", "routed"),
}
# These change where or how long a run works, never what it computes.
_FREE = ("data", "out", "device", "progress", "save_every", "eval_every")


@dataclass(frozen=True)
class TrainConfig:
    """A training run: with the data it determines every weight.

    Attributes:
        tasks: the words of each task, see :func:`pyeff.train.load_tasks`.
        model: keyword arguments of :func:`pyeff.models.build` without ``tasks``, for example
            ``{"family": "dvn", "backbone": "resnet20", "levels": 4}``; the family ``backbone`` is
            the plain network (one task, one level).
        data: folder of the data sets.
        out: folder for checkpoints, metrics and plots.
        epochs: passes over the largest task; smaller ones are repeated to match.
        batch_size: images a task and step, over all processes.
        lr: learning rate; of ``onecycle`` and of any warm-up its highest value.
        momentum: of SGD.
        nesterov: Nesterov's momentum, rather than the plain one.
        weight_decay: on weights of convolutions and linear layers only.
        weight_decay_on: of expanded layers: ``factors`` acts on the weights of each member, which
            favours products of low rank; ``product`` on the weight that the layer contracts to, as
            in the plain network.
        init_from: folder or file of a run whose weights this one starts from, of a network with the
            same tensors. A run whose chains have activations, followed by a linear one from it, is
            the "+Init" of ExpandNets.
        schedule: ``multistep`` (a tenth at 50 % and 75 % of the steps), ``thirds`` (at a third and
            at two thirds), ``cosine``, ``onecycle`` (up in a straight line, down in a straight line
            to 0), ``constant``.
        warmup: share of the steps in which the rate rises from a 25th; ``onecycle``'s is 0.25 if 0.
        clip: largest gradient norm; 0 does not clip.
        label_smoothing: share of the target spread over all classes.
        level_rule: ``sum`` trains every level at every step; ``sandwich`` the largest, the
            smallest and ``sandwich_levels - 2`` random ones between.
        sandwich_levels: levels a step under the sandwich rule.
        distill: levels below the largest learn the largest's soft output instead of the labels.
        task_rule: ``joint`` sums all tasks into one optimiser step; ``alternate`` gives each task
            an optimiser step of its own, in turn.
        prune_until: for weight-connection learning (NestedNet): share of the steps over which the
            masks are thinned to their targets.
        gate_loss_weight: for HydraNets with a supervised gate: weight of the gate's own loss.
        teacher_forcing_epochs: for the same: in so many first epochs the branch that owns an
            image's class is always among the chosen.
        branch_mean: for HydraNets: what a branch's gradient is the mean over. ``batch`` is the
            loss's own gradient, in which an image that took other branches counts as zero;
            ``routed`` multiplies it by n_b / k, so that a branch learns from its share of the
            images at the rate of a network that has no other images.
        partition: for the same: which branch owns which class. ``auto`` clusters the classes by the
            outputs of a reference classifier, ``random`` deals them out, anything else names a
            JSON file as :func:`pyeff.train.partition_run.write_partition` writes it.
        partition_method: of ``auto``, see :func:`pyeff.models.hydranet.partition_classes`.
        reference: of ``auto``: a trained classifier, by its run's folder or file; ``None`` trains
            one first, in the folder ``reference`` of ``out``.
        reference_backbone: the plain network that is trained so.
        reference_epochs: its epochs; ``None`` for as many as the run has.
        augment: random crops, and mirroring where a mirrored image keeps its class.
        calibrate: batches of training images with which batch norm statistics are computed anew
            after training; 0 keeps the running ones.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp64``.
        channels_last: memory format of the weights.
        compile: run the network through :func:`torch.compile`.
        seed: of the initial weights, the order, the augmentation and the random levels.
        sync_batch_norm: under several processes, statistics over the joint batch.
        limit_train: at most this many training images of each task.
        limit_test: at most this many test images of each task.
        image_size: side in pixels for image folders of mixed sizes.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        compress: the network learns its own size: options of
            :func:`pyeff.train.compress_options.check_compress`, such as
            ``{"group": "auto", "rank": "auto"}``; ``None`` trains it as it is.
        target_params: of the same: share of the parameters that shall be left.
        reload_epoch: of the same: after so many epochs dead neurons are removed and layers of low
            rank factored, and the smaller network is trained on; ``None`` does so after the last.
        energy: of the same: share of the sum of its singular values that a factored layer keeps;
            ``None`` for the largest one that meets ``target_params``, or 0.9 without a target.
        save_every: epochs between two checkpoints; the last epoch is always saved.
        device: ``cpu``, ``cuda``, or ``auto``.
        progress: show a progress bar (on a terminal only).

    Raises:
        ValueError: a value is out of its range.
    """

    tasks: tuple[str, ...] = ("digits:class", "digits:parity")
    model: Mapping[str, Any] = field(
        default_factory=lambda: {"family": "dvn", "backbone": "resnet20", "levels": 4}
    )
    data: str | None = None
    out: str = "runs/train"
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    weight_decay_on: str = "factors"
    init_from: str | None = None
    schedule: str = "onecycle"
    warmup: float = 0.0
    clip: float = 0.0
    label_smoothing: float = 0.0
    level_rule: str = "sum"
    sandwich_levels: int = 4
    distill: bool = False
    task_rule: str = "joint"
    prune_until: float = 0.5
    gate_loss_weight: float = 1.0
    teacher_forcing_epochs: int = 0
    branch_mean: str = "batch"
    partition: str = "auto"
    partition_method: str = "greedy"
    reference: str | None = None
    reference_backbone: str = "resnet20"
    reference_epochs: int | None = None
    augment: bool = True
    calibrate: int = 0
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    sync_batch_norm: bool = True
    limit_train: int | None = None
    limit_test: int | None = None
    image_size: int | None = None
    compress: Mapping[str, Any] | None = None
    target_params: float | None = None
    reload_epoch: int | None = None
    energy: float | None = None
    eval_every: int = 1
    save_every: int = 1
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "model", dict(self.model))
        for name, choices in _CHOICES.items():
            check_setting(
                self, name, getattr(self, name) in choices, f"be one of {', '.join(choices)}"
            )
        for name in ("epochs", "batch_size", "eval_every", "save_every"):
            check_setting(self, name, getattr(self, name) >= 1, "be at least 1")
        for name in ("limit_train", "limit_test", "image_size", "reference_epochs"):
            check_setting(
                self, name, getattr(self, name) is None or getattr(self, name) >= 1, "be positive"
            )
        for name in (
            "weight_decay",
            "clip",
            "calibrate",
            "gate_loss_weight",
            "teacher_forcing_epochs",
        ):
            check_setting(self, name, getattr(self, name) >= 0, "not be negative")
        for name in ("momentum", "label_smoothing", "warmup"):
            check_setting(self, name, 0 <= getattr(self, name) < 1, "be in [0, 1)")
        check_setting(self, "lr", self.lr > 0, "be positive")
        check_setting(self, "prune_until", 0 < self.prune_until <= 1, "be in (0, 1]")
        check_setting(self, "sandwich_levels", self.sandwich_levels >= 2, "be at least 2")
        check_setting(self, "tasks", bool(self.tasks), "name at least one task")
        check_setting(
            self,
            "model",
            "family" in self.model,
            "have a family (dvn, nestednet, backbone, hydranet_resnet, ...)",
        )
        self._check_compression()
        self._check_expansion()
        learned = self.model.get("gate", "supervised") != "supervised"
        check_setting(
            self,
            "teacher_forcing_epochs",
            not (learned and self.teacher_forcing_epochs),
            "be 0 for a gate that learns from the task's loss",
        )

    def _check_compression(self) -> None:
        if self.compress is None:
            for name in ("target_params", "reload_epoch", "energy"):
                check_setting(
                    self, name, getattr(self, name) is None, "be left out without compress"
                )
            return
        object.__setattr__(self, "compress", check_compress(self.compress))
        target, epoch, energy = self.target_params, self.reload_epoch, self.energy
        check_setting(self, "target_params", target is None or 0 < target < 1, "be in (0, 1)")
        check_setting(self, "energy", energy is None or 0 < energy <= 1, "be in (0, 1]")
        check_setting(
            self,
            "reload_epoch",
            epoch is None or 1 <= epoch <= self.epochs,
            f"be in 1..{self.epochs}",
        )
        family = str(self.model.get("family"))
        check_setting(
            self,
            "model",
            family not in ("dvn", "nestednet", "erfnet") and not family.startswith("hydranet"),
            "be a classifier of one task and one level to be compressed",
        )

    def _check_expansion(self) -> None:
        expanded = self.model.get("expand") is not None
        check_setting(
            self,
            "weight_decay_on",
            self.weight_decay_on == "factors"
            or (expanded and self.model.get("activation") is None),
            "be factors for a network without linear chains",
        )
        check_setting(
            self,
            "compress",
            self.compress is None or not expanded,
            "be left out for a network with expanded layers: contract it first",
        )
        check_setting(
            self,
            "init_from",
            self.init_from is None or not str(self.model.get("family")).startswith("hydranet"),
            "be left out for a HydraNet, whose partition is its own",
        )

    def to_json(self) -> dict[str, Any]:
        """The run as a JSON-able document."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The part that decides the result: what a resumed run must share."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE}


def config_from_json(document: Mapping[str, Any]) -> TrainConfig:
    """The run that :meth:`TrainConfig.to_json` described.

    Args:
        document: what it returned, possibly after a trip through JSON.

    Returns:
        The run.

    Raises:
        ValueError: an unknown key (from another version of pyeff), or a value out of range.
    """
    check_keys(TrainConfig, document)
    return TrainConfig(**document)


def check_keys(kind: type, document: Mapping[str, Any]) -> None:
    """Refuses settings that a kind of run does not have.

    Args:
        kind: a dataclass of settings.
        document: name to value.

    Raises:
        ValueError: lists the unknown ones.
    """
    unknown = sorted(set(document) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__}: keys must be known ones, got {unknown}")


def check_setting(config: object, name: str, holds: bool, contract: str) -> None:
    """Refuses a value.

    Args:
        config: the settings.
        name: of the one that is checked.
        holds: whether it is what it must be.
        contract: that, as the end of "must ...".

    Raises:
        ValueError: it is not; names the settings' class, the contract and the value.
    """
    if not holds:
        kind = type(config).__name__
        raise ValueError(f"{kind}: {name} must {contract}, got {getattr(config, name)!r}")
