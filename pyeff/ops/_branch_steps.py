"""What a branch plan is made of: steps over slots, their shapes, and their form as integers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pyeff.ops._conv_args import output_size

OP = "branch_stage"
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")

Shape = tuple[int, ...]  # (C, H, W) of a map, (F,) of a vector


class Step(NamedTuple):
    """One operation; its result is the slot with the next number.

    The result is ``activation(kind(sources) + slot residual)``.

    Attributes:
        kind: A name in ``OPTIONS``.
        sources: Slots that are read.
        tensors: Parameters, each ``[B, ...]``, or None where a bias is missing.
        options: Integers, or tuples of them, as ``OPTIONS`` lists them.
        activation: A name in ``ACTIVATIONS``.
        residual: The slot that is added before the activation, or -1.
    """

    kind: str
    sources: tuple[int, ...]
    tensors: tuple[Tensor | None, ...] = ()
    options: Mapping[str, Any] = {}
    activation: str = "none"
    residual: int = -1

    def reads(self, slot: int) -> int:
        """How often the step reads a slot."""
        return (*self.sources, self.residual).count(slot)


# Kind -> its options in the order of their integers; a number is the length of a tuple, 0 an int.
# csrc/pyeff/branch_stage.h reads the same order.
OPTIONS: dict[str, dict[str, int]] = {
    "conv2d": {
        "out": 0,
        "kernel": 2,
        "stride": 2,
        "padding": 4,  # top, bottom, left, right
        "dilation": 2,
        "groups": 0,
    },
    "linear": {"out": 0, "features": 0},
    "scale_shift": {"channels": 0},
    "activation": {},
    "add": {},
    "pool2d": {
        "average": 0,
        "kernel": 2,
        "stride": 2,
        "padding": 2,
        "dilation": 2,
        "ceil_mode": 0,
        "count_include_pad": 0,
    },
    "adaptive_pool2d": {"average": 0, "size": 2},
    "flatten": {},
    "concat": {},
}
KINDS = tuple(OPTIONS)
FORMAT = 1
FUSABLE = ("conv2d", "linear")  # take a residual; every kind takes an activation


# --- shapes ---------------------------------------------------------------------------------------


def result_shape(step: Step, shapes: Sequence[Shape]) -> Shape:
    """The shape of a step's result, from the shapes of the slots before it."""
    source = shapes[step.sources[0]]
    options = step.options
    if step.kind == "conv2d":
        return (options["out"], *_conv_size(source, options))
    if step.kind == "linear":
        if source != (options["features"],):
            raise ValueError(
                f"{OP}: x must give linear steps their {options['features']} features, "
                f"got {list(source)}"
            )
        return (options["out"],)
    if step.kind == "scale_shift" and source[0] != options["channels"]:
        raise ValueError(
            f"{OP}: x must give {options['channels']} features to be scaled, got {list(source)}"
        )
    if step.kind == "pool2d":
        return (source[0], *_pool_size(source, options))
    if step.kind == "adaptive_pool2d":
        return (source[0], *options["size"])
    if step.kind == "flatten":
        return (source[0] * source[1] * source[2],) if len(source) == 3 else source
    if step.kind == "concat":
        others = [shapes[s] for s in step.sources[1:]]
        if any(other[1:] != source[1:] for other in others):
            raise ValueError(
                f"{OP}: x must give maps of one size to be concatenated, got "
                f"{[list(s) for s in (source, *others)]}"
            )
        return (source[0] + sum(other[0] for other in others), *source[1:])
    if step.kind == "add" and shapes[step.sources[1]] != source:
        raise ValueError(
            f"{OP}: x must give maps of one size to be added, got {list(source)} and "
            f"{list(shapes[step.sources[1]])}"
        )
    return source


def _conv_size(source: Shape, options: Mapping[str, Any]) -> tuple[int, int]:
    top, bottom, left, right = options["padding"]
    kernel, stride, dilation = (options[name] for name in ("kernel", "stride", "dilation"))
    size = (
        output_size(source[1], kernel[0], stride[0], top, bottom, dilation[0]),
        output_size(source[2], kernel[1], stride[1], left, right, dilation[1]),
    )
    _require_positive(size, source, kernel)
    return size


def _pool_size(source: Shape, options: Mapping[str, Any]) -> tuple[int, int]:
    kernel, stride, padding, dilation = (
        options[name] for name in ("kernel", "stride", "padding", "dilation")
    )
    sizes = []
    for i in (0, 1):
        extra = stride[i] - 1 if options["ceil_mode"] else 0
        room = source[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        size = (room + extra) // stride[i] + 1
        # A window that would begin in the padding at the end is left out, as torch does.
        if extra and (size - 1) * stride[i] >= source[1 + i] + padding[i]:
            size -= 1
        sizes.append(size)
    _require_positive(sizes, source, kernel)
    return sizes[0], sizes[1]


def _require_positive(size: Sequence[int], source: Shape, kernel: Sequence[int]) -> None:
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"{OP}: x must be large enough for the {list(kernel)} kernel of every step, got a map "
            f"of {list(source)}"
        )


# --- fusion ---------------------------------------------------------------------------------------


def fuse(steps: Sequence[Step], output: int) -> tuple[list[Step], int]:
    """The same branch with activations and additions moved into the steps before them."""
    work: list[Step | None] = list(steps)
    alias = list(range(len(steps) + 1))  # slot -> the slot that now holds its value
    for number, original in enumerate(steps):
        step = _renamed(original, alias)
        work[number] = step
        slot = max(step.sources)  # of two that are added, the later takes the earlier as residual
        before = work[slot - 1] if slot > 0 else None
        if before is None or before.activation != "none" or alias[output] == slot:
            continue
        if sum(_renamed(other, alias).reads(slot) for other in work if other is not None) != 1:
            continue
        if step.kind == "activation":
            work[slot - 1] = before._replace(activation=step.activation)
        elif step.kind == "add" and before.kind in FUSABLE and before.residual < 0:
            work[slot - 1] = before._replace(residual=min(step.sources), activation=step.activation)
        else:
            continue
        work[number], alias[number + 1] = None, slot
    return _compacted(work, alias[output])


def _renamed(step: Step, alias: Sequence[int]) -> Step:
    return step._replace(
        sources=tuple(alias[s] for s in step.sources),
        residual=alias[step.residual] if step.residual >= 0 else -1,
    )


def _compacted(work: Sequence[Step | None], output: int) -> tuple[list[Step], int]:
    """Without the steps that were fused away or that the output does not depend on."""
    needed, stack = {0}, [output]
    while stack:
        slot = stack.pop()
        step = work[slot - 1]
        if slot not in needed and step is not None:
            needed.add(slot)
            stack += [s for s in (*step.sources, step.residual) if s >= 0]
    slots = sorted(needed)
    number = {slot: i for i, slot in enumerate(slots)} | {-1: -1}
    kept = [
        step._replace(
            sources=tuple(number[s] for s in step.sources), residual=number[step.residual]
        )
        for slot in slots[1:]
        if (step := work[slot - 1]) is not None
    ]
    return kept, number[output]


# --- integers -------------------------------------------------------------------------------------


def encode(steps: Sequence[Step], header: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Steps as the tensors and integers of an operator's schema.

    FORMAT, how many integers the header has, the header, how many steps there are; then for each
    step: its kind, activation and residual, how many sources it has and these, its options, how
    many tensors it has and the number of each (-1 where it is None).
    """
    tensors: list[Tensor] = []
    program = [FORMAT, len(header), *header, len(steps)]
    for step in steps:
        program += [KINDS.index(step.kind), ACTIVATIONS.index(step.activation), step.residual]
        program += [len(step.sources), *step.sources]
        for name, length in OPTIONS[step.kind].items():
            value = step.options[name]
            program += list(value) if length else [int(value)]
        program.append(len(step.tensors))
        for tensor in step.tensors:
            program.append(-1 if tensor is None else len(tensors))
            if tensor is not None:
                tensors.append(tensor)
    return tensors, program


def decode(tensors: Sequence[Tensor], program: Sequence[int]) -> tuple[list[int], list[Step]]:
    """The header and the steps that ``encode`` was given.

    Raises:
        ValueError: If the integers are not such a program.
    """
    integers = iter(program)
    try:
        if next(integers) != FORMAT:
            raise ValueError(f"{OP}: program must have format {FORMAT}, got {program[0]}")
        header = _take(integers, next(integers))
        steps = [_decode_step(integers, tensors) for _ in range(next(integers))]
    except (StopIteration, RuntimeError, IndexError) as error:
        raise ValueError(f"{OP}: program must be one that BranchPlan.lower() made") from error
    return header, steps


def _decode_step(integers: Iterator[int], tensors: Sequence[Tensor]) -> Step:
    kind, activation, residual = _take(integers, 3)
    sources = _take(integers, next(integers))
    options: dict[str, Any] = {}
    for name, length in OPTIONS[KINDS[kind]].items():
        options[name] = tuple(_take(integers, length)) if length else next(integers)
    numbers = _take(integers, next(integers))
    parameters = tuple(None if i < 0 else tensors[i] for i in numbers)
    return Step(KINDS[kind], tuple(sources), parameters, options, ACTIVATIONS[activation], residual)


def _take(integers: Iterator[int], count: int) -> list[int]:
    return [next(integers) for _ in range(count)]
