"""What the members of an expanded layer look like: kernels, widths, strides, padding."""

from collections.abc import Sequence
from typing import NamedTuple

from pyeff.nn.contraction import Pair

MODES = ("auto", "cl", "ck")
FORMS = ("auto", "expanded", "contracted")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Edges = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes them


class MemberPlan(NamedTuple):
    """One convolution of a chain, but for its padding."""

    kernel_size: Pair
    stride: Pair
    dilation: Pair


def choose_mode(op: str, mode: str, size: Pair) -> str:
    """``"cl"`` or ``"ck"``; ``"auto"`` takes ck for odd square kernels beyond 3 x 3.

    Raises:
        ValueError: an unknown mode, or ck where no chain of 3 x 3 kernels has that size.
    """
    check_choice(op, "mode", mode, MODES)
    if mode == "auto":
        return "ck" if size[0] == size[1] and size[0] > 3 and size[0] % 2 else "cl"
    if mode == "ck":
        if size[0] % 2 == 0 or size[1] % 2 == 0:
            raise ValueError(
                f"{op}: kernel_size must be odd for mode 'ck', as a chain of odd kernels is odd, "
                f"got {size}; mode 'cl' takes it"
            )
        if max(size) < 5:
            raise ValueError(
                f"{op}: kernel_size must have a side of 5 or more for mode 'ck', as a single 3 x 3 "
                f"member is no expansion, got {size}; mode 'cl' takes it"
            )
    return mode


def plan_members(mode: str, size: Pair, stride: Pair, dilation: Pair) -> list[MemberPlan]:
    """The chain of a mode.

    cl: 1 x 1, the kernel with the stride, 1 x 1. ck: 3 x 3 members until a side is used up, from
    then on with one tap along it; the stride on the last.
    """
    one = (1, 1)
    if mode == "cl":
        point = MemberPlan(one, one, one)
        return [point, MemberPlan(size, stride, dilation), point]
    length = (max(size) - 1) // 2
    kernels = [tuple(3 if 2 * i + 1 < side else 1 for side in size) for i in range(length)]
    return [
        MemberPlan((height, width), stride if i == length - 1 else one, dilation)
        for i, (height, width) in enumerate(kernels)
    ]


def inner_widths(
    op: str,
    members: int,
    channels: Pair,
    groups: int,
    rate: float,
    widths: Sequence[int] | None,
) -> tuple[int, ...]:
    """Channels between the members: those given, or rate * inputs first, then rate * outputs.

    Args:
        op: for messages.
        members: of the chain.
        channels: inputs and outputs of the layer.
        groups: every width is a multiple of them.
        rate: positive.
        widths: one fewer than members, or ``None``.

    Raises:
        ValueError: a rate that is not positive, widths of another number or that the groups do not
            divide.
    """
    if widths is None:
        if not rate > 0:
            raise ValueError(f"{op}: rate must be positive, got {rate}")
        first, others = (max(1, round(rate * c / groups)) * groups for c in channels)
        return (first, *[others] * (members - 2))
    widths = tuple(widths)
    if len(widths) != members - 1:
        raise ValueError(
            f"{op}: widths must be {members - 1} numbers for {members} members, got {widths}"
        )
    if any(width < 1 or width % groups for width in widths):
        what = "positive" if groups == 1 else f"positive multiples of the {groups} groups"
        raise ValueError(f"{op}: widths must be {what}, got {widths}")
    return widths


def input_edges(op: str, padding: Pair | str, size: Pair, stride: Pair, dilation: Pair) -> Edges:
    """How far the input is padded on its four sides, as ``nn.Conv2d`` does it.

    Raises:
        ValueError: an unknown word, ``"same"`` with a stride, negative padding.
    """
    if not isinstance(padding, str):
        if min(padding) < 0:
            raise ValueError(f"{op}: padding must be at least 0, got {padding}")
        return padding[1], padding[1], padding[0], padding[0]
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise ValueError(f'{op}: padding must be ints, "same" or "valid", got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'{op}: padding "same" must have stride 1, got {stride}')
    height, width = (d * (k - 1) for d, k in zip(dilation, size, strict=True))
    # Of an odd total the larger half is on the right and at the bottom.
    return width // 2, width - width // 2, height // 2, height - height // 2


def is_symmetric(edges: Edges) -> bool:
    """Whether a convolution of its own can pad so."""
    left, right, top, bottom = edges
    return left == right and top == bottom


def pair_of(op: str, name: str, value: int | tuple[int, ...], minimum: int) -> Pair:
    """Two numbers, where one stands for both.

    Raises:
        ValueError: other than one or two ints, or one below the minimum.
    """
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{op}: {name} must be one int or two, got {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value!r}")
    return values[0], values[1]


def check_channels(op: str, in_channels: int, out_channels: int, groups: int) -> None:
    """Raises ValueError for channels that are not positive or that groups do not divide."""
    if min(in_channels, out_channels) < 1:
        raise ValueError(
            f"{op}: in_channels and out_channels must be positive, got {in_channels} and "
            f"{out_channels}"
        )
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{op}: groups must divide in_channels {in_channels} and out_channels {out_channels}, "
            f"got {groups}"
        )


def check_choice(op: str, name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError for a word that is not known."""
    if value not in known:
        allowed = ", ".join(map(repr, known))
        raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}")


def check_form(op: str, form: str, activation: str | None) -> None:
    """Raises ValueError for an unknown form, and for the contracted one of a non-linear chain."""
    check_choice(op, "form", form, FORMS)
    if form == "contracted" and activation is not None:
        raise ValueError(
            f"{op}: form must be 'expanded' or 'auto' with an activation between the members, as "
            f"no single layer equals them, got {form!r}"
        )
