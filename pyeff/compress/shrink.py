"""Removal of dead channels: ``shrink``."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pyeff.compress.channel_group import ChannelGroup
from pyeff.compress.cut_layers import composed, filters_of, layer_sizes
from pyeff.compress.groups import ChannelMap, Example, map_channels
from pyeff.compress.layer_calls import arguments_of, output_of
from pyeff.compress.removal import Options, Removal, remove_dead
from pyeff.compress.round_to import MULTIPLES, fastest
from pyeff.compress.saved import carry_description
from pyeff.compress.shrink_report import ShrinkReport
from pyeff.compress.trial import as_precise, largest_difference

_OP = "shrink"


def shrink(
    model: nn.Module,
    example: Example,
    *,
    groups: Sequence[ChannelGroup] | None = None,
    threshold: float = 0.0,
    constants: Literal["fold", "keep"] = "fold",
    round_to: int | Literal["auto"] | None = None,
) -> nn.Module:
    """A network without the channels whose filters are zero; the given one is not changed.

    A channel goes where all that its readers see of it is a constant, whatever the live layers
    beside it do; the constant (what a batch norm and an activation make of zero) becomes part of
    the readers' biases, or of the running mean of the batch norm after them. In eval mode the
    network computes what it did. The one difference: a reader that pads its maps with zeros saw
    zeros outside of them and a constant inside, which no bias can tell apart at the borders.
    Channels are removed again as long as that makes further filters zero.

    Args:
        model: any network that :func:`pyeff.compress.channel_groups` can trace.
        example: its input, or several; of a real size, since shapes are followed.
        groups: the only groups to look at, as ``channel_groups`` gives them; all by default.
        threshold: filters without a weight of larger magnitude count as zero.
        constants: ``"fold"``: exact but for the borders; ``"keep"``: channels with a constant that
            is not 0 stay where a reader pads with zeros, so that the result is exact everywhere.
        round_to: keep so many dead channels that every layer has a multiple of this; ``"auto"``
            measures the network at several multiples and takes the fastest.

    Returns:
        A new network in the mode of the given one, with layers of the same classes. Of a network of
        :mod:`pyeff.models` ``config`` describes it for :func:`pyeff.save`; others are saved with
        :func:`pyeff.compress.save`.

    Raises:
        TypeError: a model or an example of the wrong kind.
        ValueError: a layer would lose all its channels; the example is no input of the model; the
            model cannot be traced; an option out of range.
        ImportError: torch-pruning is missing.

    Source: Alvarez, Salzmann, "Learning the Number of Neurons in Deep Networks", NIPS 2016, for
    what is removed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_()
        >>> shrink(net, torch.randn(1, 3, 9, 9))[0].out_channels
        3
    """
    return shrink_with_report(
        model,
        example,
        groups=groups,
        threshold=threshold,
        constants=constants,
        round_to=round_to,
    )[0]


def shrink_with_report(
    model: nn.Module,
    example: Example,
    *,
    groups: Sequence[ChannelGroup] | None = None,
    threshold: float = 0.0,
    constants: Literal["fold", "keep"] = "fold",
    round_to: int | Literal["auto"] | None = None,
) -> tuple[nn.Module, ShrinkReport]:
    """:func:`shrink`, and what it did.

    Args:
        model, example, groups, threshold, constants, round_to: as there.

    Raises:
        TypeError, ValueError, ImportError: as there.
    """
    _check(model, example, threshold, constants, round_to)
    inputs = arguments_of(example)
    try:
        output_of(model, inputs)
    except Exception as error:
        # Whatever a network raises for an input that it does not take.
        raise ValueError(
            f"{_OP}: example must be an input that the model takes, got "
            f"{[list(x.shape) for x in inputs]} ({type(error).__name__}: {error})"
        ) from error
    found = _chosen_groups(model, inputs, groups)
    options = Options(threshold, constants, 1)
    seconds: dict[int, float] = {}
    if round_to == "auto":
        tried = {n: _shrunk(model, inputs, found, options._replace(round_to=n)) for n in MULTIPLES}
        multiple, seconds = fastest({n: made.model for n, made in tried.items()}, inputs)
        made = tried[multiple]
    else:
        multiple = round_to or 1
        made = _shrunk(model, inputs, found, options._replace(round_to=multiple))
    carry_description(made.model, model)
    return made.model, _report(model, inputs, found, made, multiple, seconds)


def _check(model: Any, example: Any, threshold: Any, constants: Any, round_to: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor) and not (
        isinstance(example, Sequence) and all(isinstance(x, Tensor) for x in example)
    ):
        raise TypeError(
            f"{_OP}: example must be a tensor or a sequence of tensors, got "
            f"{type(example).__name__}"
        )
    if not threshold >= 0:
        raise ValueError(f"{_OP}: threshold must not be negative, got {threshold}")
    if constants not in ("fold", "keep"):
        raise ValueError(f"{_OP}: constants must be 'fold' or 'keep', got {constants!r}")
    positive = isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1
    if round_to not in (None, "auto") and not positive:
        raise ValueError(
            f"{_OP}: round_to must be a positive int, 'auto' or None, got {round_to!r}"
        )


def _chosen_groups(
    model: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[ChannelGroup] | None
) -> ChannelMap:
    if groups is None:
        return map_channels(model, inputs)
    known = {name for name, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for group in groups:
        for member in group.members:
            if member.name not in known:
                raise ValueError(
                    f"{_OP}: groups must be of this model, got {group.name} with {member.name}"
                )
    return ChannelMap(tuple(groups), {})


def _shrunk(
    model: nn.Module, inputs: tuple[Tensor, ...], found: ChannelMap, options: Options
) -> Removal:
    """Removes what is dead, and what is dead without it, and so on."""
    made = remove_dead(model, inputs, found.groups, options)
    allowed = {name for group in found.groups for name in group.producers}
    while made.sources and _has_new_zeros(model, made):
        groups = map_channels(made.model, inputs).groups
        groups = tuple(group for group in groups if allowed.issuperset(group.producers))
        again = remove_dead(made.model, inputs, groups, options._replace(threshold=0))
        if not again.sources:
            break
        made = Removal(
            again.model,
            composed(made.sources, again.sources),
            made.kept,
            made.borders or again.borders,
            max(made.difference, again.difference),
            again.tolerance,
        )
    return made


def _has_new_zeros(model: nn.Module, made: Removal) -> bool:
    """Whether filters became zero with the inputs that they lost."""
    for name, layer in made.model.named_modules():
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        prefix = f"{name}.weight" if name else "weight"
        if prefix not in made.sources:  # such as those whose weight is computed
            continue
        zeros = (filters_of(layer) == 0).all(1)
        before = (filters_of(model.get_submodule(name)) == 0).all(1)
        if not zeros.any():
            continue
        if int(zeros.sum()) > int(before.sum()) - (before.numel() - zeros.numel()):
            return True
    return False


def _report(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    found: ChannelMap,
    made: Removal,
    multiple: int,
    seconds: dict[int, float],
) -> ShrinkReport:
    names = sorted({name for group in found.groups for name in group.producers})
    before, after = layer_sizes(model, names), layer_sizes(made.model, names)
    (one, other), given = as_precise([made.model, model], inputs)
    return ShrinkReport(
        channels={name: (before[name], after[name]) for name in names},
        kept=made.kept,
        left_out=found.left_out,
        parameters=(_count(model), _count(made.model)),
        difference=largest_difference(output_of(one, given), output_of(other, given)),
        cut_difference=made.difference,
        tolerance=made.tolerance,
        borders=made.borders,
        round_to=multiple,
        seconds=seconds,
        sources=made.sources,
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
