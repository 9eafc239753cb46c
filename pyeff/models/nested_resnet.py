"""A residual network that runs any of its tasks at any of its levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.measure import LevelCost
from pyeff.models.budget import level_costs, pick_level
from pyeff.models.layout import Active, Layout
from pyeff.models.materialise import materialise_level
from pyeff.models.nested_block import NestedBlock, NestedStem, NormOptions
from pyeff.models.residual import global_pool
from pyeff.models.resnet import ResNet, initialise, stem_plan
from pyeff.models.units import active_interval
from pyeff.nn import NestedLinear


@dataclass(frozen=True)
class NestedOptions:
    """What a :class:`NestedResNet` is besides its layout.

    Attributes:
        tasks: for every task, its classes at each level.
        levels: number of levels.
        starts: for every task, the unit it starts from, from 1.
        in_channels: channels of the images.
        stem: ``"3x3"``, ``"7x7"`` or ``"den"``.
        task_stems: whether every task has a stem of its own.
        image_sizes: for every task, the pixels of its images, for stem ``"den"``.
        level_heads: whether every level has a classifier of its own.
        norm_affine, norm_statistics: see :class:`NestedBatchNorm2d`.
        masked: whether levels mask single weights of the blocks instead of channels.
        block_levels: for every block, the first level that runs it; ``None``: all run always.
        config: keyword arguments of :func:`pyeff.models.build` that rebuild the model.
    """

    tasks: Mapping[str, Sequence[int]]
    levels: int
    starts: Sequence[int]
    in_channels: int = 3
    stem: str = "3x3"
    task_stems: bool = False
    image_sizes: Mapping[str, int] = field(default_factory=dict)
    level_heads: bool = False
    norm_affine: str = "private"
    norm_statistics: str = "private"
    masked: bool = False
    block_levels: Sequence[int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class NestedResNet(nn.Module):
    """A residual network that serves several tasks at several levels (``dvn``, ``nestednet``).

    What is active is worked out once in a forward pass and handed down as one
    :class:`~pyeff.models.layout.Active`; the modules keep no state between calls.

    Attributes:
        tasks: classes of every task at the largest level.
        levels: number of levels.
        config: JSON-able keyword arguments with which :func:`pyeff.models.build` rebuilds it.
    """

    def __init__(self, layout: Layout, options: NestedOptions) -> None:
        super().__init__()
        _check_options(options)
        self.layout, self.options = layout, options
        self.tasks = {name: classes[-1] for name, classes in options.tasks.items()}
        self.levels = options.levels
        self.config = dict(options.config)
        self._names = list(self.tasks)
        self._classes = [list(classes) for classes in options.tasks.values()]
        norms = NormOptions(
            len(self.tasks), self.levels, options.norm_affine, options.norm_statistics
        )
        backbone = layout.backbone
        width = layout.grids[layout.stem].channels
        self.stems = nn.ModuleList()
        self.stem_plans = []
        for name in self._names if options.task_stems else self._names[:1]:
            size = options.image_sizes.get(name)
            plan = stem_plan(options.stem, options.in_channels, width, size)
            self.stem_plans.append(plan)
            own = options.task_stems
            self.stems.append(NestedStem(plan, layout.stem, norms, own))
        self.blocks = nn.ModuleList(
            NestedBlock(layout, block, norms, options.masked) for block in layout.blocks
        )
        features = layout.grids[layout.features].channels
        self.norm = norms.build(features) if backbone.preactivation else None
        self.heads = nn.ModuleList(self._task_heads(features, sizes) for sizes in self._classes)
        initialise(self)

    def _task_heads(self, features: int, classes: list[int]) -> nn.ModuleList:
        sizes = classes if self.options.level_heads else classes[-1:]
        return nn.ModuleList(NestedLinear(features, size) for size in sizes)

    def head_of(self, task: int, level: int) -> NestedLinear:
        """The classifier of a task (index) at a level."""
        heads = cast(nn.ModuleList, self.heads[task])
        head = heads[level - 1 if self.options.level_heads else 0]
        return cast(NestedLinear, head)

    def heads_of(self, task: int) -> list[NestedLinear]:
        """All classifiers of a task (index): one, or one for each level."""
        heads = cast(nn.ModuleList, self.heads[task])
        return [cast(NestedLinear, head) for head in heads]

    def stem_of(self, task: int) -> NestedStem:
        """The stem of a task (index)."""
        return cast(NestedStem, self.stems[task if self.options.task_stems else 0])

    def block(self, index: int) -> NestedBlock:
        """The block with that index."""
        return cast(NestedBlock, self.blocks[index])

    def classes(self, task: str | int | None = None, level: int | None = None) -> int:
        """How many classes a task has at a level (``None``: the only task, the largest level)."""
        active = self.activate(task, level)
        return self._classes[active.task][active.level - 1]

    def blocks_at(self, level: int) -> list[int]:
        """Indices of the blocks that a level runs."""
        first = self.options.block_levels
        return [i for i in range(len(self.blocks)) if first is None or first[i] <= level]

    def activate(self, task: str | int | None = None, level: int | Tensor | None = None) -> Active:
        """Works out what runs for a task and a level.

        Args:
            task: name or index; may be left out where there is one task.
            level: from 1; ``None`` for the largest; a 0-d int64 tensor in ``torch.export``.

        Raises:
            ValueError: an unknown task, a level out of range.
            TypeError: a level that is not an integer.
        """
        index = self._task_index(task)
        if isinstance(level, Tensor):
            return self._activate_tensor(index, level)
        if level is None:
            level = self.levels
        if not isinstance(level, int):
            raise TypeError(
                f"{type(self).__name__}: level must be an int, a tensor or None, "
                f"got {type(level).__name__}"
            )
        if not 1 <= level <= self.levels:
            raise ValueError(
                f"{type(self).__name__}: level must be in 1..{self.levels}, got {level}"
            )
        if not any(self.layout.sliced):
            return Active(index, level, self.layout.full_ranges())
        units = active_interval(self.options.starts[index], level, self.levels)
        return Active(index, level, self.layout.ranges(units))

    def _activate_tensor(self, task: int, level: Tensor) -> Active:
        """As :meth:`activate`, for a level that is data: ``torch.export`` keeps it as an input."""
        if level.dim() != 0 or level.dtype != torch.int64:
            raise ValueError(
                f"{type(self).__name__}: level must be a 0-d int64 tensor (or [N], in eval mode), "
                f"got {level.dtype} of shape {tuple(level.shape)}"
            )
        number = cast(int, level.item())  # int() would make a symbol a number
        torch._check_value(
            number >= 1, lambda: f"{type(self).__name__}: level must be at least 1, got {number}"
        )
        torch._check_value(
            number <= self.levels,
            lambda: f"{type(self).__name__}: level must be at most {self.levels}, got {number}",
        )
        if not any(self.layout.sliced):
            return Active(task, number, self.layout.full_ranges())
        start = self.options.starts[task]
        lows = [active_interval(start, i, self.levels)[0] for i in range(1, self.levels + 1)]
        table = torch.tensor(lows, dtype=torch.int64, device=level.device)
        low = cast(int, table[level - 1].item())
        torch._check(low >= 0)
        torch._check(low + number <= self.levels)
        return Active(task, number, self.layout.ranges((low, low + number)))

    def _task_index(self, task: str | int | Tensor | None) -> int:
        kind = type(self).__name__
        if task is None:
            if len(self._names) > 1:
                raise ValueError(f"{kind}: task must be one of {self._names}, got None")
            return 0
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"{kind}: task must be one of {self._names}, got {task!r}")
            return self._names.index(task)
        if isinstance(task, Tensor):
            task = int(task.item())
        if not isinstance(task, int):
            raise TypeError(
                f"{kind}: task must be a name, an index or None, got {type(task).__name__}"
            )
        if not 0 <= task < len(self._names):
            raise ValueError(f"{kind}: task must be in 0..{len(self._names) - 1}, got {task}")
        return task

    def forward(
        self,
        x: Tensor,
        task: str | int | Tensor | None = None,
        level: int | Tensor | None = None,
    ) -> Tensor:
        """Classifies images as a task at a level.

        Args:
            x: ``[N, C, H, W]``.
            task: name or index (dict order); may be left out where there is one task. A tensor
                ``[N]`` of indices: per image (eval mode).
            level: from 1; ``None`` for the largest. A tensor ``[N]``: per image (eval mode). A 0-d
                int64 tensor: a level that ``torch.export`` keeps as an input.

        Returns:
            Logits ``[N, classes]``; per image: ``[N, largest class count]``, missing classes -inf.

        Raises:
            ValueError: an unknown task, a level out of range, images of the wrong shape, a mixed
                batch in training mode.
        """
        if x.dim() != 4 or x.shape[1] != self.options.in_channels:
            raise ValueError(
                f"{type(self).__name__}: x must be [N, {self.options.in_channels}, H, W], "
                f"got {list(x.shape)}"
            )
        per_image = [v for v in (task, level) if isinstance(v, Tensor) and v.dim() > 0]
        if per_image:
            return self._forward_mixed(x, task, level)
        return self.run(x, self.activate(task, level))  # type: ignore[arg-type]  # 0-d or plain

    def run(self, x: Tensor, active: Active) -> Tensor:
        """Runs what is active (from :meth:`activate`) on images ``[N, C, H, W]``."""
        x = self.stem_of(active.task)(x, active)
        first = self.options.block_levels
        for index, block in enumerate(self.blocks):
            if first is None or first[index] <= active.level:
                x = block(x, active)
        features = active.ranges[self.layout.features]
        if self.norm is not None:
            x = F.relu(self.norm(x, active.task, active.level, features), inplace=True)
        head = self.head_of(active.task, active.level)
        pooled = global_pool(x)
        return head(pooled, features)

    def _forward_mixed(
        self, x: Tensor, task: str | int | Tensor | None, level: int | Tensor | None
    ) -> Tensor:
        """Runs every distinct (task, level) of a batch once and puts the rows back in order."""
        if self.training:
            raise ValueError(
                f"{type(self).__name__}: tasks and levels per image must be run in eval mode, "
                "got training mode"
            )
        groups: dict[tuple[int, int], list[int]] = {}
        tasks = self._per_image(task, len(x), "task")
        levels = self._per_image(level, len(x), "level")
        for row, (one_task, one_level) in enumerate(zip(tasks, levels, strict=True)):
            active = self.activate(one_task, one_level)
            groups.setdefault((active.task, active.level), []).append(row)
        most = max(max(classes) for classes in self._classes)
        out = x.new_full((len(x), most), float("-inf"))
        for (one_task, one_level), rows in groups.items():
            index = torch.tensor(rows, device=x.device)
            logits = self.run(x.index_select(0, index), self.activate(one_task, one_level))
            padded = F.pad(logits, (0, most - logits.shape[1]), value=float("-inf"))
            out = out.to(padded.dtype).index_copy(0, index, padded)
        return out

    def _per_image(self, value: Any, images: int, name: str) -> list[Any]:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return [value] * images
        if value.shape != (images,) or value.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: {name} must be one integer for each of the {images} "
                f"images, got {value.dtype} of shape {list(value.shape)}"
            )
        return value.tolist()

    def costs(
        self,
        task: str | int | None = None,
        input_size: int | tuple[int, int] | None = None,
        latency: bool = False,
    ) -> list[LevelCost]:
        """What each level of a task costs.

        Args:
            task: name or index; may be left out where there is one task.
            input_size: pixels, or (H, W); by default the backbone's (or the task's image size).
            latency: whether to measure the time of one image, levels interleaved.

        Returns:
            One :class:`~pyeff.measure.LevelCost` for each level, smallest first.
        """
        return level_costs(self, task, input_size, latency)

    def pick(
        self,
        task: str | int | None = None,
        *,
        max_params: int | None = None,
        max_macs: int | None = None,
        max_memory: int | None = None,
        max_latency: float | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> int:
        """The largest level of a task that keeps within every given budget.

        Args:
            task: name or index; may be left out where there is one task.
            max_params: parameters, all of them.
            max_macs: multiply-adds for one image.
            max_memory: bytes of weights and of the activations of one image at their peak.
            max_latency: seconds for one image, measured now.
            input_size: as in :meth:`costs`.

        Raises:
            ValueError: no budget given, or none of the levels fits; the smallest level's cost is
                named.
        """
        budgets = {
            "max_params": max_params,
            "max_macs": max_macs,
            "max_memory": max_memory,
            "max_latency": max_latency,
        }
        return pick_level(self, task, budgets, input_size)

    def materialise(self, task: str | int | None = None, level: int | None = None) -> ResNet:
        """A level of a task as a plain network of torch layers with weights of its own."""
        return materialise_level(self, self.activate(task, level))


def _check_options(options: NestedOptions) -> None:
    if not options.tasks:
        raise ValueError("NestedResNet: tasks must name at least one task, got none")
    if options.levels < 1 or options.in_channels < 1:
        raise ValueError(
            f"NestedResNet: levels and in_channels must be positive, got {options.levels} and "
            f"{options.in_channels}"
        )
    for name, classes in options.tasks.items():
        if len(classes) != options.levels or min(classes) < 1:
            raise ValueError(
                f"NestedResNet: task {name!r} must have a positive number of classes for each of "
                f"{options.levels} levels, got {list(classes)}"
            )
    if len(options.starts) != len(options.tasks):
        raise ValueError(
            f"NestedResNet: start units must be one for each of {len(options.tasks)} tasks, got "
            f"{list(options.starts)}"
        )
    if not all(1 <= start <= options.levels for start in options.starts):
        raise ValueError(
            f"NestedResNet: start units must be in 1..{options.levels}, got {list(options.starts)}"
        )
