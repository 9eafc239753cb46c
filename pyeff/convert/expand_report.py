"""What expansion did to every layer, and why it left the others."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExpandedLayer:
    """One convolution or linear layer.

    Attributes:
        name: of the module.
        kind: its type before.
        shape: of its weight.
        params: parameters before.
        made: what is in its place, in words; ``None`` where it stays.
        params_after: parameters of that.
        left: why the layer stays as it is; ``None`` where it was expanded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    made: str | None = None
    params_after: int | None = None
    left: str | None = None

    @property
    def expanded(self) -> bool:
        """Whether something else is in the layer's place."""
        return self.left is None


@dataclass(frozen=True)
class ExpandReport:
    """What :func:`pyeff.convert.expand` did.

    Attributes:
        layers: every convolution and linear layer, in the order of the modules.
        parameters: of the whole network, before and after.
        difference: largest difference of the outputs on the example, where weights were carried
            over; else ``None``.
        relative: the same over the largest output.
    """

    layers: tuple[ExpandedLayer, ...]
    parameters: tuple[int, int]
    difference: float | None = None
    relative: float | None = None

    @property
    def expanded(self) -> tuple[str, ...]:
        """Names of the layers that were expanded."""
        return tuple(layer.name for layer in self.layers if layer.expanded)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able document."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = self.parameters
        number = f"{len(self.expanded)} of {len(self.layers)} layers"
        lines = [f"expand: {number}, {before:,} -> {after:,} parameters"]
        for layer in self.layers:
            text = f"left: {layer.left}"
            if layer.made is not None:
                text = f"{layer.made}, params {layer.params:,} -> {layer.params_after:,}"
            lines.append(f"  {layer.name or '(model)'}: {text}")
        if self.relative is not None:
            lines.append(
                f"  output on the example: differs by {self.difference:.1e} "
                f"({self.relative:.1e} relative)"
            )
        return "\n".join(lines)
