"""What ``--compress`` says: which regularisers, how strong, and how the network is made smaller."""

import math
from collections.abc import Callable, Mapping
from typing import Any

FORMS = ("channel", "spatial", "auto")
CONDITIONS = ("macs", "time", "both", "always")
# Of group sparsity alone.
GROUP_OPTIONS = ("alpha", "first_layers", "first_factor", "include_norm", "floor", "tied", "mask")


def _strength(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError("be auto or above 0")
    return number


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = float(value)
        if not low <= number <= high:
            raise ValueError(f"be in [{low:g}, {high:g}]")
        return number

    return read


def _whole(low: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(value)
        if number != float(value) or number < low:
            raise ValueError(f"be a whole number of at least {low}")
        return number

    return read


def _flag(value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    word = str(value).lower()
    if word not in known:
        raise ValueError("be true or false")
    return known[word]


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"be one of {', '.join(words)}")
        return str(value)

    return read


def _every(value: Any) -> int | str:
    return "epoch" if value == "epoch" else _whole(1)(value)


def _round_to(value: Any) -> int | str:
    return "auto" if value == "auto" else _whole(1)(value)


# Each option and what reads its value. The first two are the regularisers.
_READERS: dict[str, Callable[[Any], Any]] = {
    "group": _strength,
    "rank": _strength,
    # of the group sparsity
    "alpha": _number(0, 1),
    "first_layers": _whole(0),
    "first_factor": _number(0, 1),
    "include_norm": _flag,
    "floor": _whole(1),
    "tied": _one_of("joint", "skip"),
    "mask": _flag,
    # of both
    "every": _every,
    "keep_scale": _flag,
    # of the removal and the factorisation
    "form": _one_of(*FORMS),
    "only_if": _one_of(*CONDITIONS),
    "constants": _one_of("fold", "keep"),
    "round_to": _round_to,
}


def parse_compress(text: str) -> dict[str, Any]:
    """Reads ``group=auto,rank=auto,alpha=0.5``.

    Args:
        text: ``name=value`` with commas between.

    Returns:
        The options, checked as by :func:`check_compress`.

    Raises:
        ValueError: a part that is no ``name=value``, a name twice, an unknown one, a bad value.
    """
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"compress: options must be NAME=VALUE,NAME=VALUE, got {text!r}")
        if name in options:
            raise ValueError(f"compress: an option must be given once, got {name} twice")
        options[name] = value
    return check_compress(options)


def check_compress(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their values as numbers and flags.

    Args:
        options: by name: ``group`` and ``rank`` (``"auto"`` or a strength; one of them at least);
            ``alpha``, ``first_layers``, ``first_factor``, ``include_norm``, ``floor``, ``tied``,
            ``mask`` as in :class:`pyeff.compress.GroupSparsity`, with ``group`` only; ``every`` as
            there and in :class:`pyeff.compress.LowRank`; ``keep_scale`` as in
            :class:`pyeff.compress.Compressor`; ``form`` and ``only_if`` as in
            :func:`pyeff.compress.factorize`; ``constants`` and ``round_to`` as in
            :func:`pyeff.compress.shrink`.

    Raises:
        ValueError: neither regulariser, an unknown name, a bad value, an option of the regulariser
            that is not there.
    """
    unknown = sorted(set(options) - set(_READERS))
    if unknown:
        raise ValueError(
            f"compress: options must be among {', '.join(_READERS)}, got {', '.join(unknown)}"
        )
    if not {"group", "rank"} & set(options):
        raise ValueError(
            f"compress: options must name group or rank, got {', '.join(options) or 'none'}"
        )
    idle = [name for name in GROUP_OPTIONS if name in options and "group" not in options]
    if idle:
        raise ValueError(f"compress: {', '.join(idle)} must come with group, got rank alone")
    checked = {}
    for name, value in options.items():
        try:
            checked[name] = _READERS[name](value)
        except (TypeError, ValueError) as error:
            words = str(error) if str(error).startswith("be ") else "be a number"
            raise ValueError(f"compress: {name} must {words}, got {value!r}") from error
    return checked
