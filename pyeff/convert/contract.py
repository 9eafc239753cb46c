"""Expanded networks as the plain ones that they equal: ``contract``."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyeff.compress.layer_calls import Example
from pyeff.convert.compare import Apart, Comparison, check_example, compare, default_tolerance
from pyeff.convert.contract_report import ContractedLayer, ContractReport
from pyeff.convert.replace import describe_anew, expanded_layers, parameter_count, with_layers

_OP = "contract"


def contract(
    model: nn.Module, example: Example | None = None, *, tolerance: float | None = None
) -> nn.Module:
    """The network with every expanded layer as the plain one that it equals; not changed itself.

    ``ExpandedConv2d`` and the blocks of parallel branches (``RepVGGBlock``, ``ACBlock``,
    ``DiverseBranchBlock``) become an ``nn.Conv2d``, ``ExpandedLinear`` an ``nn.Linear``. Weights
    are computed in float64 and rounded once. With an example the outputs are compared, in eval
    mode, with those of the members run one by one.

    Args:
        model: any network; one without expanded layers is copied, and not compared.
        example: its input, or several.
        tolerance: how far the outputs of the network and of each layer may lie apart, relative to
            the largest; by default what rounding of the weights can make of it, 100 units of the
            network's precision, or 1000 where it cannot be run in float64.

    Returns:
        A new network in the mode of the given one. Of a network of :mod:`pyeff.models` ``config``
        describes it for :func:`pyeff.save`; the state dict of others is that of the plain network.
        Hooks on the expanded layers are gone with them.

    Raises:
        TypeError: a model or an example of the wrong kind.
        ValueError: a layer that no plain one equals; an example that the model does not take; a
            difference beyond the tolerance.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020; Ding et al., "RepVGG", CVPR 2021.

    Example:
        >>> net = nn.Sequential(pyeff.nn.ExpandedConv2d(3, 8, 5, padding=2), nn.ReLU())
        >>> contract(net, torch.randn(1, 3, 9, 9))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
          (1): ReLU()
        )
    """
    return contract_with_report(model, example, tolerance=tolerance)[0]


def contract_with_report(
    model: nn.Module, example: Example | None = None, *, tolerance: float | None = None
) -> tuple[nn.Module, ContractReport]:
    """:func:`contract`, and what it did.

    Args:
        model, example, tolerance: as there.

    Raises:
        TypeError, ValueError: as there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"{_OP}: tolerance must not be negative, got {tolerance}")
    inputs: tuple[Tensor, ...] | None = None
    if example is not None:
        inputs = check_example(_OP, model, example)
    found = expanded_layers(model)
    made = {name: _contracted(name, layer) for name, layer in found.items()}
    small = with_layers(model, made)
    describe_anew(small, model, expand=None, activation=None)
    layers = tuple(
        ContractedLayer(
            name, type(layer).__name__, parameter_count(layer), parameter_count(made[name])
        )
        for name, layer in found.items()
    )
    report = ContractReport(layers, (parameter_count(model), parameter_count(small)))
    if inputs is None or not found:
        return small, report
    seen = compare(model, small, inputs, {name: name for name in found})
    limit = default_tolerance(model, seen.precision) if tolerance is None else tolerance
    _check_difference(seen, limit)
    return small, _with_comparison(report, seen, limit)


@torch.no_grad()
def _contracted(name: str, layer: nn.Module) -> nn.Module:
    try:
        plain: nn.Module = cast(Any, layer).contract()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_OP}: layer {name!r} must equal a plain one, got one that does not ({error})"
        ) from error
    return plain


def _check_difference(seen: Comparison, limit: float) -> None:
    largest = seen.whole
    for other in seen.layers.values():
        largest = largest.or_more(other)
    if largest.relative <= limit:
        return
    where = ""
    if seen.worst is not None:
        where = (
            f"; the layer that differs most is {seen.worst!r}, {_words(seen.layers[seen.worst])}"
        )
    raise ValueError(
        f"{_OP}: outputs must differ by no more than {limit:.1e} of the largest, got "
        f"{_words(seen.whole)}{where}"
    )


def _words(apart: Apart) -> str:
    return f"{apart.relative:.1e} ({apart.absolute:.1e} absolute)"


def _with_comparison(report: ContractReport, seen: Comparison, limit: float) -> ContractReport:
    layers = []
    for layer in report.layers:
        apart = seen.layers.get(layer.name)
        if apart is not None:
            layer = replace(layer, difference=apart.absolute, relative=apart.relative)
        layers.append(layer)
    return replace(
        report,
        layers=tuple(layers),
        difference=seen.whole.absolute,
        relative=seen.whole.relative,
        tolerance=limit,
        precision=seen.precision,
        worst=seen.worst,
    )
