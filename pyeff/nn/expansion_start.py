"""Weights with which a chain of linear convolutions computes what one given convolution does.

Around one member, which is solved for, the others are random, so that no zeros or symmetries stay
in the way of training. All in float64; a leading axis of the weights counts groups.
"""

from collections.abc import Sequence
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff.nn.contraction import Kernel, Pair, compose, compose_all

_MOST_FEATURES = 9  # more than nine 3 x 3 filters are dependent
# Beyond it a float32 network would not compute the same: errors grow with the condition, and with
# few of the draws it is so large.
_LARGEST_CONDITION = 1e5
_DRAWS = 8


def start_cl(op: str, weight: Tensor, members: Sequence[Kernel], noise: float) -> list[Tensor]:
    """Weights of 1 x 1, kernel, 1 x 1 whose product is ``weight``.

    The outer two have orthonormal columns and rows, so that their transposes invert them.

    Args:
        op: for messages.
        weight: ``[O, I / groups, kh, kw]``.
        members: three, in float64, as they would start otherwise: they give shapes and norms.
        noise: of what is added to the middle one and does not pass the outer ones, in its usual
            size.

    Returns:
        The weights of the members.

    Raises:
        ValueError: too few channels between the members.
    """
    groups = members[0].groups
    exact = weight.double().unflatten(0, (groups, -1))  # [g, O, I, kh, kw]
    widths = [member.shape[0] // groups for member in members[:2]]
    unfolded = exact.movedim(2, 1).flatten(2), exact.flatten(2)
    # Whatever the dtype: the numbers of halves are exact, not known to their last digit only.
    eps = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    outer = [_outer(matrix, width, eps) for matrix, width in zip(unfolded, widths, strict=True)]
    needed = tuple(rank * groups for _, rank in outer)
    given = tuple(width * groups for width in widths)
    if any(width < rank for width, rank in zip(given, needed, strict=True)):
        raise ValueError(
            f"{op}: widths must be at least {needed} for an expanded layer that computes the "
            f"same as this weight, got {given}"
        )
    first, last = outer[0][0], outer[1][0].mT  # [g, P, I], [g, O, Q]
    middle = _between(exact, last.mT, first.mT)
    usual = members[1].weight.unflatten(0, (groups, -1))
    extra = noise * usual
    extra = extra - _between(_between(extra, last, first), last.mT, first.mT)
    # All members deviate from their usual norms by the same factor.
    in_scale = members[0].weight.norm() / first.norm()
    out_scale = members[2].weight.norm() / last.norm()
    middle = middle / (in_scale * out_scale)
    factor = _root(middle.norm() / usual.norm(), 3)
    return [
        (first * (in_scale * factor)).flatten(0, 1)[:, :, None, None],
        (middle / factor**2 + extra).flatten(0, 1),
        (last * (out_scale * factor)).flatten(0, 1)[:, :, None, None],
    ]


def _root(ratio: Tensor, degree: int) -> float:
    """What every member of a chain is scaled by; 1 where there is nothing to scale."""
    value = float(ratio)
    return value ** (1 / degree) if 0 < value < float("inf") else 1.0


def _between(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left @ weight @ right`` at every tap."""
    return torch.einsum("gao,goiyx,gib->gabyx", left, weight, right)


def _outer(matrix: Tensor, width: int, eps: float) -> tuple[Tensor, int]:
    """A random ``[g, width, I]`` whose transpose undoes it on the columns of ``[g, I, any]``.

    Returns:
        It, and a width that suffices: the rank of the columns where the given one is below I.
    """
    groups, channels = matrix.shape[:2]
    drawn = matrix.new_empty(groups, width, channels).normal_()
    if width >= channels:
        return torch.linalg.qr(drawn).Q, channels
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    threshold = max(matrix.shape[1:]) * eps * values.amax(-1, keepdim=True)
    rank = max(1, int((values > threshold).sum(-1).max()))
    basis = left[:, :, : min(rank, width)]
    return torch.linalg.qr(drawn[:, :, : basis.shape[2]]).Q @ basis.mT, rank


class _Features(NamedTuple):
    """Chains of small filters on both sides of the member that is solved for.

    Every channel of the layer has the same ones. ``before`` makes several maps of one, ``after``
    one of several.
    """

    before: list[Kernel]
    after: list[Kernel]
    taps: Pair  # of the member

    @property
    def maps(self) -> Pair:
        """Maps that go into the member and that come out of it, a channel."""
        inputs = self.before[-1].shape[0] if self.before else 1
        return inputs, self.after[0].shape[1] if self.after else 1

    def matrix(self) -> Tensor:
        """From the member's taps to those of the whole chain.

        Returns:
            ``[taps of the chain, outputs * inputs * taps of the member]``
        """
        inputs, outputs = self.maps
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        made = (compose_all(self.before).weight if self.before else one).repeat(outputs, 1, 1, 1)
        read = compose_all(self.after).weight if self.after else one
        read = read.transpose(0, 1).repeat_interleave(inputs, 0)
        pairs = inputs * outputs
        shifts = torch.eye(prod(self.taps), dtype=torch.float64).unflatten(1, (1, *self.taps))
        joined = compose(Kernel(made, groups=pairs), Kernel(read, groups=pairs))
        moved = Kernel(shifts.repeat(pairs, 1, 1, 1), groups=pairs)
        return compose(joined, moved).weight.flatten(1).T


def start_ck(op: str, weight: Tensor, members: Sequence[Kernel], noise: float) -> list[Tensor]:
    """Weights of a chain of small kernels whose composition is ``weight``.

    Members before the one that is solved for make several maps of every input channel, those after
    it read several maps for every output channel. Where these filters and the shifts by the
    member's own taps span all taps, the member follows from a small linear system, the same for
    every pair of channels. Last, the channels between the members are rotated.

    Args, Returns, Raises: as :func:`start_cl`.
    """
    groups = members[0].groups
    channels = (weight.shape[1], weight.shape[0] // groups)
    taps = [member.taps for member in members]
    widths = [member.shape[0] // groups for member in members[:-1]]
    norms = [float(m.weight.norm()) / sqrt(groups) for m in members]
    found = []
    for place in _DRAWS * [*range(len(members))]:
        counts = [w // channels[i >= place] for i, w in enumerate(widths)]
        if all(counts):
            features = _draw(taps, counts, place, norms, channels)
            found.append((float(torch.linalg.cond(_wide(features.matrix()))), place, features))
    if not found or min(found, key=lambda f: f[0])[0] > _LARGEST_CONDITION:
        raise ValueError(
            f"{op}: widths must be larger, {_sufficient(taps, channels, groups)} for example, for "
            f"an expanded layer of 3 x 3 members that computes the same, got "
            f"{tuple(w * groups for w in widths)}"
        )
    _, place, features = min(found, key=lambda f: f[0])
    exact = weight.double().unflatten(0, (groups, -1))
    usual = [member.weight.unflatten(0, (groups, -1)) for member in members]
    solved, extra = _solve(exact, features, noise * usual[place])
    factor = _root(solved.norm() / usual[place].norm(), len(members))
    blocks = [factor * _diagonal(k.weight, channels[0], groups) for k in features.before]
    blocks.append(solved / factor ** (len(members) - 1) + extra)
    blocks += [factor * _diagonal(k.weight, channels[1], groups) for k in features.after]
    full = [_filled(block, noise * start) for block, start in zip(blocks, usual, strict=True)]
    return [rotated.flatten(0, 1) for rotated in _rotate(full)]


def _draw(
    taps: Sequence[Pair], counts: Sequence[int], place: int, norms: Sequence[float], channels: Pair
) -> _Features:
    """Random filters for a place, with so many features between the members."""
    counts = [min(count, _MOST_FEATURES) for count in counts]
    maps = [1, *counts[:place]], [*counts[place:], 1]

    def chain(side: int, first: int) -> list[Kernel]:
        drawn = []
        for i, (inputs, outputs) in enumerate(zip(maps[side], maps[side][1:], strict=False)):
            filters = torch.randn(outputs, inputs, *taps[first + i], dtype=torch.float64)
            norm = norms[first + i] / sqrt(channels[side])
            drawn.append(Kernel(filters * (norm / filters.norm())))
        return drawn

    return _Features(chain(0, 0), chain(1, place + 1), taps[place])


def _wide(matrix: Tensor) -> Tensor:
    """A matrix whose condition is infinite where its columns cannot span its rows."""
    missing = max(0, matrix.shape[0] - matrix.shape[1])
    return torch.cat([matrix, matrix.new_zeros(matrix.shape[0], missing)], 1)


def _sufficient(taps: Sequence[Pair], channels: Pair, groups: int) -> tuple[int, ...]:
    """The smallest widths, with the same number of features everywhere, that suffice."""
    sufficing = []
    for count in range(1, _MOST_FEATURES + 1):
        for place in range(len(taps)):
            features = _draw(taps, [count] * (len(taps) - 1), place, [1.0] * len(taps), (1, 1))
            if torch.linalg.cond(_wide(features.matrix())) <= _LARGEST_CONDITION:
                inner = range(len(taps) - 1)
                sufficing.append([count * channels[i >= place] * groups for i in inner])
    return tuple(min(sufficing, key=sum))


def _solve(exact: Tensor, features: _Features, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The member between the features, and of the noise what may be added to it.

    Both are ``[g, O * outputs, I * inputs, kh, kw]``.
    """
    inputs, outputs = features.maps
    groups, out_channels, in_channels = exact.shape[:3]
    matrix = features.matrix().to(exact.device)
    inverse = torch.linalg.pinv(matrix)
    noise = noise[:, : out_channels * outputs, : in_channels * inputs]
    noise = noise.reshape(groups, out_channels, outputs, in_channels, inputs, *features.taps)
    noise = noise.transpose(2, 3).flatten(3)  # [g, O, I, outputs * inputs * taps]
    found = exact.flatten(3) @ inverse.T, noise - noise @ matrix.T @ inverse.T

    def member(values: Tensor) -> Tensor:
        values = values.unflatten(3, (outputs, inputs, *features.taps)).transpose(2, 3)
        return values.flatten(3, 4).flatten(1, 2)

    return member(found[0]), member(found[1])


def _diagonal(filters: Tensor, channels: int, groups: int) -> Tensor:
    """The same filters for every channel: ``[g, channels * a, channels * b, kh, kw]``."""
    made, read = filters.shape[:2]
    one = torch.eye(channels, dtype=filters.dtype)
    block = torch.einsum("cd,abyx->cadbyx", one, filters).flatten(2, 3).flatten(0, 1)
    return block.expand(groups, channels * made, channels * read, *filters.shape[2:])


def _filled(block: Tensor, usual: Tensor) -> Tensor:
    """A member of its full size: channels beyond those of the block are made but not read."""
    full = usual.clone()
    full[:, : block.shape[1]] = 0
    full[:, : block.shape[1], : block.shape[2]] = block.to(full.device)
    return full


def _rotate(weights: list[Tensor]) -> list[Tensor]:
    """The chain with the channels between its members rotated at random."""
    for i in range(len(weights) - 1):
        groups, width = weights[i].shape[:2]
        drawn = weights[i].new_empty(groups, width, width).normal_()
        rotation = torch.linalg.qr(drawn).Q
        weights[i] = torch.einsum("gab,gbiyx->gaiyx", rotation, weights[i])
        weights[i + 1] = torch.einsum("gab,goayx->gobyx", rotation.mT, weights[i + 1])
    return weights
