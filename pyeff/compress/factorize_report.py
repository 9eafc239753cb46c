"""What factorisation did to every layer, and why it left the others."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerFactors:
    """One convolution or linear layer.

    Attributes:
        name: of the module.
        kind: its type.
        shape: of its weight.
        form: ``"channel"`` or ``"spatial"``, of the pair or of the best one that was tried;
            ``None`` where none was.
        values: the singular values of the matrix of that form, falling.
        floor: singular values up to here are rounding.
        rank: chosen by the rule.
        error: relative error of the weights at this rank.
        params: parameters before.
        params_after: of the pair, kept or not.
        macs: multiply-adds of one image before; ``None`` without an example.
        macs_after: of the pair.
        seconds: measured time of the layer alone, or of the one that runs it in a call of its own;
            ``None`` where time was not asked for, or multiply-adds decided before.
        seconds_after: with the pair.
        left: why the layer stays as it is; ``None`` where the pair is in its place.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    form: str | None = None
    values: tuple[float, ...] = ()
    floor: float = 0.0
    rank: int | None = None
    error: float | None = None
    params_after: int | None = None
    macs: int | None = None
    macs_after: int | None = None
    seconds: float | None = None
    seconds_after: float | None = None
    left: str | None = None

    @property
    def factored(self) -> bool:
        """Whether a pair is in the layer's place."""
        return self.left is None


@dataclass(frozen=True)
class FactorizeReport:
    """What :func:`pyeff.compress.factorize` did.

    Attributes:
        rule: which singular values are kept, in words.
        only_if: the condition under which a pair is put in a layer's place.
        layers: every convolution and linear layer, in the order of the modules.
        difference: relative difference of the network's output on the example, in eval mode;
            ``None`` without an example.
    """

    rule: str
    only_if: str
    layers: tuple[LayerFactors, ...]
    difference: float | None = None

    @property
    def factored(self) -> tuple[str, ...]:
        """Names of the layers that are pairs now."""
        return tuple(layer.name for layer in self.layers if layer.factored)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able document."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"factorize: {self.rule}; only if cheaper by: {self.only_if}"]
        for layer in self.layers:
            lines.append(f"  {layer.name or '(model)'}: {_words(layer)}")
        if self.difference is not None:
            lines.append(f"  output on the example: relative difference {self.difference:.3g}")
        return "\n".join(lines)


def _words(layer: LayerFactors) -> str:
    tried = ""
    if layer.rank is not None:
        tried = f"{layer.form}, rank {layer.rank} of {len(layer.values)}"
        tried += f", params {layer.params:,} -> {layer.params_after:,}"
        if layer.macs is not None and layer.macs_after is not None:
            tried += f", MACs {layer.macs:,} -> {layer.macs_after:,}"
        if layer.seconds is not None and layer.seconds_after is not None:
            tried += f", {1e3 * layer.seconds:.3f} -> {1e3 * layer.seconds_after:.3f} ms"
    if layer.left is None:
        return tried
    return f"left: {layer.left}" + (f" ({tried})" if tried else "")
