"""Layers of low rank as two smaller ones: ``factorize``."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from pyeff.compress.expanded import refuse_expanded
from pyeff.compress.factor_forms import (
    Decomposition,
    Factored,
    decompose,
    forms_of,
    pair_of,
    shared_weights,
    why_left,
)
from pyeff.compress.factorize_report import FactorizeReport, LayerFactors
from pyeff.compress.factorize_time import Candidate, keep_faster
from pyeff.compress.layer_calls import Example, layer_inputs, output_of, relative_difference
from pyeff.compress.rank_rules import RankRule
from pyeff.compress.saved import carry_description
from pyeff.measure.cost import layer_costs
from pyeff.models.described import replace_layer

_OP = "factorize"
FORMS = ("channel", "spatial", "auto")
CONDITIONS = ("macs", "time", "both", "always")
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_Shapes = list[tuple[int, ...]]


def factorize(
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    max_error: float | None = None,
    form: str = "auto",
    only_if: str = "macs",
    example: Example | None = None,
    layers: Collection[str] | None = None,
) -> nn.Module:
    """A network whose layers of low rank are two smaller layers each; the given one is not changed.

    Exactly one of ``energy``, ``rank`` and ``max_error`` says how many singular values a layer
    keeps. At full rank the network computes what it did.

    Args:
        model: any network. Its ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.Linear`` are
            looked at; grouped ones are left, since each group is a small matrix of its own.
        energy: keep the fewest singular values whose sum reaches this share of the SUM of all (not
            of their squares), in (0, 1]; 1 keeps the numerical rank.
        rank: the rank of every layer, or of the layers that it names.
        max_error: largest relative error of a layer's weights, ``|W - W_r|_F / |W|_F``.
        form: ``"channel"``: a convolution with r outputs, then a 1 x 1 with the bias (a 1-D layer
            is r x C x k, then F x r); ``"spatial"``: for k x k kernels a k x 1, then a 1 x k;
            ``"auto"``: of the two the one with fewer multiply-adds.
        only_if: put a pair in a layer's place only if it has fewer multiply-adds (``"macs"``;
            without an example: fewer weights), takes less measured time (``"time"``; members of
            layers that run as one call are measured within these), ``"both"``, or ``"always"``.
        example: the input of a forward pass, a tensor or several; needed to measure time, and to
            find layers whose weights their parents read themselves.
        layers: names of the only layers to look at.

    Returns:
        A new network in the mode of the given one. What became of each layer is what
        :func:`factorize_with_report` returns beside it. Of a network of :mod:`pyeff.models`
        ``config`` describes it for :func:`pyeff.save`; others are saved with
        :func:`pyeff.compress.save`.

    Raises:
        TypeError: a model, layers or ranks of the wrong kind.
        ValueError: none or several rules, a value out of range, names that the model has not, time
            without an example, expanded layers, which :func:`pyeff.convert.contract` makes plain.

    Source: Alvarez, Salzmann, "Compression-aware Training of Deep Networks", NIPS 2017; the
    spatial form: Jaderberg, Vedaldi, Zisserman, BMVC 2014, scheme 2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(16, 32, (3, 1)), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> small = factorize(model, rank=4, form="channel")
        >>> [tuple(layer.weight.shape) for layer in small[0]]
        [(4, 16, 3, 1), (32, 4, 1, 1)]
    """
    rule = RankRule(energy, rank, max_error)
    return factorize_with_report(
        model, rule, form=form, only_if=only_if, example=example, layers=layers
    )[0]


@torch.no_grad()
def factorize_with_report(
    model: nn.Module,
    rule: RankRule,
    *,
    form: str = "auto",
    only_if: str = "macs",
    example: Example | None = None,
    layers: Collection[str] | None = None,
) -> tuple[nn.Module, FactorizeReport]:
    """:func:`factorize`, and what became of each layer.

    Args:
        model: any network.
        rule: how many singular values a layer keeps.
        form, only_if, example, layers: as in :func:`factorize`.

    Raises:
        TypeError, ValueError: as :func:`factorize`.
    """
    named = _layers_of(model)
    _check(model, named, rule, form, only_if, example, layers)
    shapes: dict[str, _Shapes] | None = None
    if example is not None:
        shapes = layer_inputs(model, example, list(named))
    aliases, shared = _aliases(model), shared_weights(model)
    candidates: dict[str, Candidate] = {}
    results: dict[str, LayerFactors] = {}
    for name, layer in named.items():
        about = LayerFactors(
            name,
            type(layer).__name__,
            tuple(cast(Tensor, layer.weight).shape),
            sum(p.numel() for p in layer.parameters()),
        )
        called = None if shapes is None else shapes.get(name, [])
        reason = why_left(layer, name in shared)
        if reason is None and called is not None and not called:
            reason = "not called on the example: its parent reads its weights, or does not run it"
        if layers is not None and name not in layers:
            reason = "not among the layers that were asked for"
        if reason is not None:
            results[name] = replace(about, left=reason)
            continue
        plan = _Plan(name, cast(Factored, layer), called, only_if)
        results[name], pair = plan.run(about, rule, form)
        if pair is not None:
            candidates[name] = Candidate(layer, pair, called or ())
    if only_if in ("time", "both") and example is not None:
        results |= keep_faster(model, example, candidates, results)
    pairs = {name: found.pair for name, found in candidates.items() if results[name].factored}
    small = _rebuilt(model, pairs, aliases)
    carry_description(small, model)
    difference = None
    if example is not None:
        difference = relative_difference(output_of(small, example), output_of(model, example))
    return small, FactorizeReport(str(rule), only_if, tuple(results.values()), difference)


@dataclass(frozen=True)
class _Plan:
    """One layer that can be factored: where it runs and whether fewer multiply-adds are asked."""

    name: str
    layer: Factored
    shapes: _Shapes | None
    only_if: str

    @property
    def images(self) -> _Shapes:
        """The shapes of one image each; inputs may come without a batch."""
        own = 1 if isinstance(self.layer, nn.Linear) else 3
        return [shape if len(shape) == own else shape[1:] for shape in self.shapes or []]

    def run(
        self, about: LayerFactors, rule: RankRule, form: str
    ) -> tuple[LayerFactors, nn.Module | None]:
        """Tries the forms; the pair is ``None`` where the layer stays."""
        if not bool(self.layer.weight.any()):
            return replace(about, left="all its weights are zero: there is nothing to keep"), None
        tried = []
        for one in forms_of(self.layer, form):
            cut = decompose(self.layer, one)
            rank = rule.of(self.name, cut.values, cut.floor)
            if rank is None:
                return replace(about, left="the rule names no rank for it"), None
            pair = pair_of(self.layer, cut, rank)
            tried.append((self._about(about, cut, rank, pair), pair))
        result, pair = min(tried, key=lambda t: _cost_after(t[0]))
        left = self._too_dear(result)
        return replace(result, left=left), None if left else pair

    def _about(
        self, about: LayerFactors, cut: Decomposition, rank: int, pair: nn.Module
    ) -> LayerFactors:
        return replace(
            about,
            form=cut.form,
            values=tuple(cut.values.tolist()),
            floor=cut.floor,
            rank=rank,
            error=cut.error(rank),
            params_after=sum(p.numel() for p in pair.parameters()),
            macs=None if self.shapes is None else _macs(self.layer, self.images),
            macs_after=None if self.shapes is None else _macs(pair, self.images),
        )

    def _too_dear(self, result: LayerFactors) -> str | None:
        """Why the pair is not worth it by its multiply-adds, where these count."""
        if self.only_if in ("macs", "both"):
            before, after = _cost_before(result), _cost_after(result)
            if after >= before:
                counted = "weights" if result.macs is None else "multiply-adds"
                return f"the pair would have {after:,} {counted}, the layer has {before:,}"
        return None


def _cost_before(layer: LayerFactors) -> int:
    return layer.params if layer.macs is None else layer.macs


def _cost_after(layer: LayerFactors) -> int:
    after = layer.params_after if layer.macs_after is None else layer.macs_after
    return cast(int, after)


def _macs(layer: nn.Module, images: _Shapes) -> int:
    """Multiply-adds of one image, over all calls."""
    counted = copy.deepcopy(layer).to("meta")
    return sum(cost.macs for image in images for cost in layer_costs(counted, image)[0])


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer by its first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    refuse_expanded(_OP, model)
    kinds = (*_CONVOLUTIONS, nn.Linear)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _check(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    rule: RankRule,
    form: str,
    only_if: str,
    example: Example | None,
    layers: Collection[str] | None,
) -> None:
    for what, value, known in (("form", form, FORMS), ("only_if", only_if, CONDITIONS)):
        if value not in known:
            raise ValueError(f"{_OP}: {what} must be one of {', '.join(known)}, got {value!r}")
    if only_if in ("time", "both") and example is None:
        raise ValueError(f"{_OP}: example must be given where time is measured, got None")
    if isinstance(layers, str):
        raise TypeError(f"{_OP}: layers must be several names, got the text {layers!r}")
    asked = list(layers or []) + (list(rule.rank) if isinstance(rule.rank, Mapping) else [])
    unknown = sorted(set(asked) - set(named))
    if unknown:
        raise ValueError(
            f"{_OP}: layers must be convolutions or linear layers of the model, got {unknown}"
        )


def _aliases(model: nn.Module) -> dict[str, Sequence[str]]:
    """All names of a module by its first one."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {found[0]: found for found in names.values()}


def _rebuilt(
    model: nn.Module, pairs: Mapping[str, nn.Module], aliases: Mapping[str, Sequence[str]]
) -> nn.Module:
    """A copy of the model with the pairs in their places, under every name of a layer."""
    if "" in pairs:
        return pairs[""]
    small = copy.deepcopy(model)
    for name, pair in pairs.items():
        for alias in aliases[name]:
            replace_layer(small, alias, pair)
    return small
