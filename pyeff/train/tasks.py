"""From the words of a task ("cifar100:fine", "birds=pictures/birds") to its images in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyeff.train.chars74k import read_chars74k
from pyeff.train.cifar import read_cifar10, read_cifar100
from pyeff.train.digits import read_digits
from pyeff.train.folder import read_folder

_Split = tuple[Tensor, Tensor]
_SPECS = (
    "cifar100:fine, cifar100:coarse, cifar10, chars74k, chars74k:grey, digits:class, "
    "digits:parity, NAME=FOLDER"
)
# Pixels before the random crop; a quarter of the papers' 4 for 8-pixel digits, whose strokes fill
# the image.
_PAD = {"digits": 1}


@dataclass(frozen=True)
class TaskData:
    """One task's images, all in memory.

    Attributes:
        name: the task's name in the model.
        spec: the words it was asked for with.
        train_images, test_images: uint8 ``[N, H, W, C]``.
        train_labels, test_labels: int64 ``[N]``.
        class_names: one a class.
        pad: pixels of zero padding before the random crop.
        flip: whether a mirrored image keeps its label.
        mean, std: of the training images, per channel, in units of 0..1.
    """

    name: str
    spec: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    pad: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        height, width, channels = self.train_images.shape[1:]
        return channels, height, width

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps, so that a model can be used without its data set."""
        return {
            "spec": self.spec,
            "classes": list(self.class_names),
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
        }


def load_tasks(
    specs: Sequence[str],
    data: Path | None = None,
    *,
    limit_train: int | None = None,
    limit_test: int | None = None,
    image_size: int | None = None,
) -> list[TaskData]:
    """Loads every task of a training run.

    Args:
        specs: ``cifar100:fine``, ``cifar100:coarse``, ``cifar10``, ``chars74k`` (in colour) or
            ``chars74k:grey``, ``digits`` or ``digits:class``, ``digits:parity``, ``folder:PATH``,
            or ``NAME=`` before any of them or before a path.
        data: the folder that holds the CIFAR folders and chars74k; relative paths start here.
        limit_train: at most this many training images of each task (the first ones).
        limit_test: the same for test images.
        image_size: side in pixels for image folders of mixed sizes.

    Returns:
        One entry a task, in order. Tasks with the same images share their memory. Grey images
        become RGB where another task has colour.

    Raises:
        ValueError: an unknown or repeated task, or a missing or broken folder.
        ImportError: an extra is missing.
    """
    if not specs:
        raise ValueError(f"tasks: specs must name at least one task ({_SPECS}), got none")
    shared: dict[str, Tensor] = {}
    tasks: list[TaskData] = []
    for spec in specs:
        task = _load(spec, data, limit_train, limit_test, image_size, shared)
        if any(task.name == other.name for other in tasks):
            raise ValueError(f"tasks: names must differ, got {task.name!r} twice: write NAME=...")
        tasks.append(task)
    channels = max(task.image_shape[0] for task in tasks)
    return [_with_channels(task, channels) for task in tasks]


def parse_spec(spec: str) -> tuple[str, str, str]:
    """Splits a task's words.

    Returns:
        ``(name, kind, argument)`` with kind one of cifar10, cifar100, chars74k, digits,
        folder.

    Raises:
        ValueError: no such task.
    """
    name, equals, rest = spec.partition("=")
    if not equals:
        name, rest = "", spec
    kind, _, argument = rest.partition(":")
    known = {
        "cifar10": ("",),
        "cifar100": ("fine", "coarse"),
        "chars74k": ("", "grey"),
        "digits": ("", "class", "parity"),
    }
    if kind in known:
        if argument not in known[kind]:
            options = ", ".join(f"{kind}:{a}" for a in known[kind] if a) or kind
            raise ValueError(f"tasks: {kind} must be one of {options}, got {spec!r}")
        return name or rest, kind, argument
    if kind == "folder" and argument:
        return name or Path(argument).name, "folder", argument
    if name and rest:
        return name, "folder", rest
    raise ValueError(f"tasks: a task must be one of {_SPECS}, got {spec!r}")


def _load(
    spec: str,
    data: Path | None,
    limit_train: int | None,
    limit_test: int | None,
    image_size: int | None,
    shared: dict[str, Tensor],
) -> TaskData:
    name, kind, argument = parse_spec(spec)
    path = (data / argument if data else Path(argument)).resolve()
    readers: dict[str, Callable[[], tuple[_Split, _Split, list[str]]]] = {
        "cifar10": lambda: read_cifar10(data),
        "cifar100": lambda: read_cifar100(data, argument),
        "chars74k": lambda: read_chars74k(data, argument, image_size),
        "digits": lambda: read_digits(argument or "class"),
        "folder": lambda: read_folder(path, image_size),
    }
    train, test, class_names = readers[kind]()
    sources = {"folder": f"folder:{path}", "chars74k": f"chars74k:{argument}"}
    source = sources.get(kind, kind)
    train_images = shared.setdefault(f"{source} train", train[0][:limit_train])
    test_images = shared.setdefault(f"{source} test", test[0][:limit_test])
    mean, std = _moments(train_images)
    return TaskData(
        name=name.replace(".", "_"),
        spec=spec,
        train_images=train_images,
        train_labels=train[1][:limit_train],
        test_images=test_images,
        test_labels=test[1][:limit_test],
        class_names=tuple(class_names),
        pad=_PAD.get(kind, 4),
        # A mirrored digit or letter is another or none; natural images keep their class.
        flip=kind in ("cifar10", "cifar100"),
        mean=mean,
        std=std,
    )


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in units of 0..1, exact over all pixels."""
    flat = images.reshape(-1, images.shape[-1])
    means, deviations = [], []
    for channel in range(flat.shape[1]):
        counts = torch.bincount(flat[:, channel].int(), minlength=256).double()
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts * levels).sum() / counts.sum()
        variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
        means.append(float(mean))
        deviations.append(float(variance.sqrt().clamp_min(1e-3)))
    return tuple(means), tuple(deviations)


def _with_channels(task: TaskData, channels: int) -> TaskData:
    have = task.image_shape[0]
    if have == channels:
        return task
    values = {field: getattr(task, field) for field in task.__dataclass_fields__}
    for split in ("train_images", "test_images"):
        values[split] = values[split].expand(*values[split].shape[:-1], channels).contiguous()
    values["mean"], values["std"] = task.mean * channels, task.std * channels
    return TaskData(**values)
