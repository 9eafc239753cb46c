"""What contraction did to every expanded layer, and how far the outputs moved."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ContractedLayer:
    """One layer that is a single one now.

    Attributes:
        name: of the module.
        kind: its type before.
        params: parameters before.
        params_after: of the plain layer.
        difference: largest difference of its output, on the input that it has on the example;
            ``None`` without an example, or where it does not run as a layer.
        relative: the same over the largest output.
    """

    name: str
    kind: str
    params: int
    params_after: int
    difference: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class ContractReport:
    """What :func:`pyeff.convert.contract` did.

    Attributes:
        layers: every expanded layer, in the order of the modules.
        parameters: of the whole network, before and after.
        difference: largest difference of the network's output on the example, in eval mode;
            ``None`` without an example or without an expanded layer.
        relative: the same over the largest output.
        tolerance: what ``relative`` of the network and of every layer was held to.
        precision: the dtype of the comparison; the weights are those of the networks as they are.
        worst: the layer with the largest relative difference.
    """

    layers: tuple[ContractedLayer, ...]
    parameters: tuple[int, int]
    difference: float | None = None
    relative: float | None = None
    tolerance: float | None = None
    precision: str | None = None
    worst: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able document."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"contract: {len(self.layers)} layers, {before:,} -> {after:,} parameters"]
        for layer in self.layers:
            text = f"  {layer.name or '(model)'}: {layer.kind}, "
            text += f"params {layer.params:,} -> {layer.params_after:,}"
            if layer.relative is not None:
                text += f", differs by {layer.difference:.1e} ({layer.relative:.1e} relative)"
            lines.append(text)
        if self.relative is not None:
            lines.append(
                f"  output on the example ({self.precision}): differs by {self.difference:.1e} "
                f"({self.relative:.1e} relative, tolerance {self.tolerance:.0e})"
            )
        if self.worst is not None:
            lines.append(f"  largest difference of a layer: {self.worst or '(model)'}")
        return "\n".join(lines)
