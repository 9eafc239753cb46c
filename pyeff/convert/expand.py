"""Networks with layers that are larger in training than at run time: ``expand``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pyeff.compress.layer_calls import Example
from pyeff.convert.candidates import Candidate, Choice, candidates
from pyeff.convert.compare import check_example, compare
from pyeff.convert.expand_report import ExpandedLayer, ExpandReport
from pyeff.convert.replace import describe_anew, parameter_count, with_layers
from pyeff.nn import (
    ACBlock,
    DiverseBranchBlock,
    ExpandedConv2d,
    ExpandedLinear,
    Reparam,
    RepVGGBlock,
)

_OP = "expand"
CHAINS = ("auto", "cl", "ck")
BLOCKS: dict[str, type[Reparam]] = {
    "repvgg": RepVGGBlock,
    "acnet": ACBlock,
    "dbb": DiverseBranchBlock,
}
_CHAIN_OPTIONS = ("form", "inner_bias", "widths")
_BLOCK_OPTIONS = ("norm_eps",)


def expand(
    model: nn.Module,
    rate: float = 4,
    mode: str = "auto",
    layers: Choice | None = None,
    *,
    linear: bool = False,
    from_compact: bool = False,
    example: Example | None = None,
    **options: Any,
) -> nn.Module:
    """A network whose layers are larger while it is trained; the given one is not changed.

    :func:`pyeff.convert.contract` gives the network of the old size back.

    By default every ``nn.Conv2d`` with more than one tap is expanded. 1 x 1 convolutions are not,
    nor are linear layers, as in the paper.

    Args:
        model: any network.
        rate: how many times as many channels are between the members of a chain; of no meaning to
            parallel branches.
        mode: chains (``"auto"``, ``"cl"``, ``"ck"``, see :class:`pyeff.nn.ExpandedConv2d`) or
            parallel branches with batch norms (``"repvgg"``, ``"acnet"``, ``"dbb"``: a
            :class:`~pyeff.nn.RepVGGBlock`, ``ACBlock``, ``DiverseBranchBlock``).
        layers: which ones. Names: those and no others, whatever their kind. Patterns with ``*``,
            ``?`` or ``[]``: of the layers that are expanded by default those that match. A function
            of a name and a layer, called with every convolution and linear layer: those for which
            it is true.
        linear: linear layers too, but for the last one in the order of modules.
        from_compact: the layers compute what they did, as far as rounding lets them, in eval mode
            where they have batch norms; else they start with fresh weights.
        example: the input of a forward pass. Finds layers whose parents read their weights without
            calling them, and with ``from_compact`` compares the outputs.
        options: for chains ``form``, ``inner_bias``, ``widths`` (channels between the members, by
            the names of layers), ``activation`` for fresh ones and ``noise`` for those that keep
            their function; for branches ``norm_eps``, and ``inner_channels`` with ``"dbb"``.

    Returns:
        A new network in the mode of the given one. What became of each layer is what
        :func:`expand_with_report` returns beside it. Of a network of :mod:`pyeff.models`
        ``config`` describes it for :func:`pyeff.save`; others are saved with
        :func:`pyeff.compress.save`, or as a state dict.

    Raises:
        TypeError: a model, layers or options of the wrong kind.
        ValueError: an unknown mode, names that the model has not, a layer that was asked for by
            name and cannot be expanded, no layer at all that can, an example that the model does
            not take.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> type(expand(net, rate=2)[0]).__name__
        'ExpandedConv2d'
    """
    return expand_with_report(
        model,
        rate,
        mode,
        layers,
        linear=linear,
        from_compact=from_compact,
        example=example,
        **options,
    )[0]


def expand_with_report(
    model: nn.Module,
    rate: float = 4,
    mode: str = "auto",
    layers: Choice | None = None,
    *,
    linear: bool = False,
    from_compact: bool = False,
    example: Example | None = None,
    **options: Any,
) -> tuple[nn.Module, ExpandReport]:
    """:func:`expand`, and what became of each layer.

    Args:
        model, rate, mode, layers, linear, from_compact, example, options: as there.

    Raises:
        TypeError, ValueError: as there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    maker = _Maker.of(rate, mode, from_compact, options)
    if example is not None:
        check_example(_OP, model, example)
    found = candidates(_OP, model, layers, linear, example)
    made: dict[str, nn.Module] = {}
    results = []
    for candidate in found:
        result, new = _expanded(candidate, maker)
        results.append(result)
        if new is not None:
            made[candidate.name] = new
    unknown = sorted(set(maker.widths) - set(made))
    if unknown:
        raise ValueError(f"{_OP}: widths must name layers that are expanded, got {unknown}")
    if not made:
        reasons = sorted({result.left for result in results if result.left is not None})
        raise ValueError(
            f"{_OP}: model must have a layer that can be expanded, got none "
            f"({'; '.join(reasons) or 'neither convolutions nor linear layers'})"
        )
    large = with_layers(model, made)
    describe_anew(large, model)
    report = ExpandReport(tuple(results), (parameter_count(model), parameter_count(large)))
    if from_compact and example is not None:
        seen = compare(large, model, example, {}).whole
        report = replace(report, difference=seen.absolute, relative=seen.relative)
    return large, report


def _expanded(candidate: Candidate, maker: "_Maker") -> tuple[ExpandedLayer, nn.Module | None]:
    """What became of a layer, and what comes in its place if anything does."""
    name, layer, left, asked = candidate
    weight = layer.weight
    result = ExpandedLayer(
        name,
        type(layer).__name__,
        tuple(weight.shape) if isinstance(weight, torch.Tensor) else (),
        parameter_count(layer),
        left=left,
    )
    new = None
    if left is None:
        try:
            new = maker.make(name, layer)
        except ValueError as error:
            result = replace(result, left=str(error))
    if asked and result.left is not None:
        raise ValueError(
            f"{_OP}: layers must name such as can be expanded, got {name!r}: {result.left}"
        )
    if new is None:
        return result, None
    return replace(result, made=_words(new), params_after=parameter_count(new)), new


def _words(layer: nn.Module) -> str:
    if isinstance(layer, ExpandedConv2d):
        return f"{layer.mode}, widths {', '.join(map(str, layer.widths))}"
    if isinstance(layer, ExpandedLinear):
        return f"three layers, widths {', '.join(map(str, layer.widths))}"
    return type(layer).__name__


@dataclass(frozen=True)
class _Maker:
    """Makes the layer that comes in the place of another one."""

    rate: float
    mode: str
    from_compact: bool
    widths: Mapping[str, Sequence[int]]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, rate: float, mode: str, from_compact: bool, options: Mapping[str, Any]) -> "_Maker":
        """Checks what does not depend on a layer."""
        if mode not in CHAINS and mode not in BLOCKS:
            known = ", ".join(map(repr, (*CHAINS, *BLOCKS)))
            raise ValueError(f"{_OP}: mode must be one of {known}, got {mode!r}")
        if not rate > 0:
            raise ValueError(f"{_OP}: rate must be positive, got {rate}")
        if mode in CHAINS:
            allowed = (*_CHAIN_OPTIONS, "noise" if from_compact else "activation")
        else:
            allowed = (*_BLOCK_OPTIONS, *(("inner_channels",) if mode == "dbb" else ()))
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            how = "that keep their function" if from_compact else "with fresh weights"
            raise TypeError(
                f"{_OP}: options must be among {', '.join(allowed)} for mode {mode!r} and layers "
                f"{how}, got {', '.join(unknown)}"
            )
        widths = options.get("widths", {})
        if not isinstance(widths, Mapping):
            raise TypeError(
                f"{_OP}: widths must be a mapping of layers' names to numbers, got {widths!r}"
            )
        others = {key: value for key, value in options.items() if key != "widths"}
        return cls(rate, mode, from_compact, widths, others)

    def make(self, name: str, layer: nn.Module) -> nn.Module:
        """The layer in the place of ``layer``, with its dtype, device, mode and ``requires_grad``.

        Raises:
            ValueError: there is none.
        """
        if isinstance(layer, nn.Linear):
            return self._linear(name, layer)
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"a {type(layer).__name__} is neither a Conv2d nor a Linear")
        if self.mode in BLOCKS:
            block = BLOCKS[self.mode]
            make = block.from_compact if self.from_compact else block.like
            return make(layer, **self.options)
        sizes: dict[str, Any] = {"mode": self.mode, "rate": self.rate}
        sizes["widths"] = self.widths.get(name)
        if self.from_compact:
            return self._of_compact(layer, sizes)
        made = ExpandedConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            layer.weight.device,
            layer.weight.dtype,
            **sizes,
            **self.options,
        )
        return _as(made, layer)

    def _of_compact(self, layer: nn.Conv2d, sizes: dict[str, Any]) -> nn.Module:
        """The same function; where small kernels of these widths cannot, and may choose, as cl."""
        try:
            return ExpandedConv2d.from_compact(layer, **sizes, **self.options)
        except ValueError:
            if sizes["mode"] != "auto" or sizes["widths"] is not None:
                raise
        return ExpandedConv2d.from_compact(layer, **{**sizes, "mode": "cl"}, **self.options)

    def _linear(self, name: str, layer: nn.Linear) -> nn.Module:
        if self.mode in BLOCKS:
            raise ValueError(f"mode {self.mode!r} is for convolutions")
        sizes: dict[str, Any] = {"rate": self.rate, "widths": self.widths.get(name)}
        if self.from_compact:
            return ExpandedLinear.from_compact(layer, **sizes, **self.options)
        made = ExpandedLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.weight.device,
            layer.weight.dtype,
            **sizes,
            **self.options,
        )
        return _as(made, layer)


def _as(made: nn.Module, layer: nn.Module) -> nn.Module:
    """In a layer's mode, trained on if that was."""
    made.requires_grad_(any(p.requires_grad for p in layer.parameters()))
    return made.train(layer.training)
