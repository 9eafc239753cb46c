"""Everything that decides a training run for segmentation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyeff.train.camvid import read_camvid
from pyeff.train.cityscapes import read_cityscapes
from pyeff.train.config import check_keys, check_setting
from pyeff.train.segmentation_data import Reading, SegmentationData
from pyeff.train.segmentation_folder import read_segmentation_folder
from pyeff.train.segmentation_metrics import EVAL_SIZES
from pyeff.train.streets import read_streets

_READERS = {
    "camvid": read_camvid,
    "cityscapes": read_cityscapes,
    "folder": read_segmentation_folder,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": (*_READERS, "streets"),
    "precision": ("fp32", "bf16", "fp64"),
    "eval_size": EVAL_SIZES,
    "keep": ("best", "last"),
}
_LEAST_SIDE = 16
# These change where or how long a run works, never what it computes.
_FREE = ("data", "out", "device", "progress", "save_every", "eval_size")


@dataclass(frozen=True)
class SegmentationConfig:
    """A training run for segmentation: with the data it determines every weight.

    The defaults are the released recipe of ERFNet but for the size and the number of epochs: first
    the encoder alone on labels at 1/8, then the whole network from the encoder's last epoch.

    Attributes:
        dataset: ``camvid``, ``cityscapes``, ``folder`` (see
            :func:`pyeff.train.segmentation_folder.read_segmentation_folder`) or ``streets``
            (drawn, no files).
        data: folder of the data set.
        out: folder for checkpoints, metrics and plots.
        size: ``(H, W)`` to train at.
        model: keyword arguments of :func:`pyeff.models.build` without the number of classes.
        stage1_epochs: passes over the training pictures with the encoder alone; 0 skips stage 1.
        epochs: passes with the whole network.
        batch_size: pictures a step, over all processes.
        lr: learning rate of each stage's first epoch.
        power: of the rate's fall, ``lr * (1 - epoch / epochs) ** power``.
        weight_decay: L2 in Adam's gradient (not AdamW's), on every parameter.
        weighted: weigh classes by ``1 / ln(a + share)``, see
            :func:`pyeff.train.segmentation_loss.class_weights`.
        init_from: folder or file of a run whose weights this one starts from: stage 1 from its
            encoder, stage 2 from the rest as well. The output layer is taken where it fits. Not
            in ``out``.
        keep: which weights of stage 2 become ``model.safetensors``: of the ``best`` epoch by mIoU
            on ``val``, or of the ``last``.
        augment: mirror, and move by up to 2 pixels.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp64``.
        channels_last: memory format of the weights.
        compile: run the network through :func:`torch.compile`.
        seed: of the initial weights, the order, the augmentation and the dropout.
        sync_batch_norm: under several processes, statistics over the joint batch.
        scenes: of ``streets``: how many to learn from.
        limit_train: at most so many training pictures, evenly spread.
        limit_test: at most so many in each other split.
        eval_size: ``official`` also reports the result at the labels' own size.
        eval_every: epochs between two evaluations; a stage's last epoch is always evaluated.
        save_every: epochs between two checkpoints; a stage's last epoch is always saved.
        device: ``cpu``, ``cuda``, or ``auto``.
        progress: show a progress bar (on a terminal only).

    Raises:
        ValueError: a value is out of its range.

    Source: Romera, Alvarez, Bergasa, Arroyo, "ERFNet", T-ITS 2018, and its released training code.
    """

    dataset: str = "streets"
    data: str | None = None
    out: str = "runs/erfnet"
    size: tuple[int, int] = (180, 240)
    model: Mapping[str, Any] = field(default_factory=lambda: {"family": "erfnet"})
    stage1_epochs: int = 20
    epochs: int = 40
    batch_size: int = 8
    lr: float = 5e-4
    power: float = 0.9
    weight_decay: float = 1e-4
    weighted: bool = True
    init_from: str | None = None
    keep: str = "best"
    augment: bool = True
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    sync_batch_norm: bool = True
    scenes: int = 400
    limit_train: int | None = None
    limit_test: int | None = None
    eval_size: str = "training"
    eval_every: int = 1
    save_every: int = 1
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        size = tuple(self.size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "model", dict(self.model))
        for name, choices in _CHOICES.items():
            check_setting(
                self, name, getattr(self, name) in choices, f"be one of {', '.join(choices)}"
            )
        check_setting(
            self,
            "size",
            len(size) == 2 and min(size) >= _LEAST_SIDE,
            f"be height and width of at least {_LEAST_SIDE} pixels",
        )
        for name in ("epochs", "batch_size", "eval_every", "save_every", "scenes"):
            check_setting(self, name, getattr(self, name) >= 1, "be at least 1")
        for name in ("stage1_epochs", "power", "weight_decay"):
            check_setting(self, name, getattr(self, name) >= 0, "not be negative")
        for name in ("limit_train", "limit_test"):
            check_setting(
                self, name, getattr(self, name) is None or getattr(self, name) >= 1, "be positive"
            )
        check_setting(self, "lr", self.lr > 0, "be positive")
        if self.init_from is not None:
            start = Path(self.init_from).resolve()
            start = start.parent if start.suffix == ".safetensors" else start
            other = Path(self.out).resolve() != start
            check_setting(self, "init_from", other, f"be of another run than out, {self.out!r}")
        check_setting(self, "model", "family" in self.model, "have a family (erfnet)")

    def to_json(self) -> dict[str, Any]:
        """The run as a JSON-able document."""
        return {**asdict(self), "size": list(self.size)}

    def deciding(self) -> dict[str, Any]:
        """The part that decides the result: what a resumed run must share."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE}


def segmentation_config_from_json(document: Mapping[str, Any]) -> SegmentationConfig:
    """The run that :meth:`SegmentationConfig.to_json` described.

    Args:
        document: what it returned, possibly after a trip through JSON.

    Returns:
        The run.

    Raises:
        ValueError: an unknown key (from another version of pyeff), or a value out of range.
    """
    check_keys(SegmentationConfig, document)
    return SegmentationConfig(**document)


def load_segmentation(
    config: SegmentationConfig, splits: tuple[str, ...] = ("train", "val", "test")
) -> SegmentationData:
    """Reads, or draws, the data that a run names.

    Args:
        config: the run.
        splits: the ones to read, of those that are there.

    Returns:
        The data, at the run's size.

    Raises:
        ValueError: a folder or file is missing or broken; names the path.
        ImportError: pillow is missing.
    """
    reading = Reading(
        (config.size[0], config.size[1]),
        splits,
        config.limit_train,
        config.limit_test,
        config.progress,
    )
    if config.dataset == "streets":
        return read_streets(reading, config.scenes)
    return _READERS[config.dataset](Path(config.data) if config.data is not None else None, reading)
