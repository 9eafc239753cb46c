"""What ``shrink`` did to a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyeff.compress.cut_layers import taken_from


@dataclass(frozen=True)
class ShrinkReport:
    """What became of a network's channels.

    Attributes:
        channels: for each layer whose outputs may be removed, how many it had and has.
        kept: for each group of channels, reasons why dead ones stayed, with their number.
        left_out: layers whose outputs are in no group, and why.
        parameters: how many numbers the network's parameters had and have.
        difference: largest difference of the outputs on the example, over the largest output.
        cut_difference: the same between the smaller network and one of full size whose dead
            channels are no longer read: what removal alone changed.
        tolerance: what ``cut_difference`` was held to.
        borders: whether a constant was folded where a layer pads with zeros: ``difference`` then
            holds what that changes at the borders of maps.
        round_to: the multiple that channels were rounded up to.
        seconds: for ``round_to="auto"``, the time of one pass for every multiple that was tried.
        sources: for each parameter and buffer that was cut, where its numbers were before.
    """

    channels: Mapping[str, tuple[int, int]]
    kept: Mapping[str, Mapping[str, int]]
    left_out: Mapping[str, str]
    parameters: tuple[int, int]
    difference: float
    cut_difference: float
    tolerance: float
    borders: bool
    round_to: int
    seconds: Mapping[int, float] = field(default_factory=dict)
    sources: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def carry(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor shaped like a parameter before, such as its momentum.

        Args:
            name: of the parameter.
            tensor: of the parameter's old shape.

        Returns:
            Of its new shape; the same tensor where the parameter was not cut.
        """
        source = self.sources.get(name)
        return tensor if source is None else taken_from(tensor, source)

    def __str__(self) -> str:
        before, after = self.parameters
        removed = 1 - after / max(before, 1)
        lines = [
            f"{before:,} -> {after:,} parameters ({removed:.1%} removed); outputs "
            f"differ by {self.difference:.1e}, by the removal alone {self.cut_difference:.1e} "
            f"(tolerance {self.tolerance:.0e})"
        ]
        if self.borders:
            lines.append("constants were folded where layers pad with zeros: borders differ")
        for multiple, seconds in self.seconds.items():
            chosen = "  <- chosen" if multiple == self.round_to else ""
            lines.append(f"  rounded up to {multiple}: {seconds * 1e3:.3f} ms{chosen}")
        lines += [f"  {n}: {b} -> {a}" for n, (b, a) in self.channels.items() if a != b]
        for group, reasons in self.kept.items():
            lines += [f"  {group}: {number} kept, {why}" for why, number in reasons.items()]
        return "\n".join(lines)
