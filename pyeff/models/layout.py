"""Where the channels of a network lie and which of them are active."""

from dataclasses import dataclass
from typing import NamedTuple

from pyeff.models.backbones import Backbone
from pyeff.nn import ChannelUnits, Range

SLICE_MODES = ("full", "inner", "grouped", "none")


class Active(NamedTuple):
    """What runs in one forward pass; handed down to the blocks, never stored.

    Attributes:
        task: index of the task, from 0.
        level: the level, from 1.
        ranges: active channels [lo, hi) of every grid of the layout.
    """

    task: int
    level: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class BlockLayout:
    """One residual block: which grids its channels belong to.

    Attributes:
        inputs, inner, outputs: indices into ``Layout.grids``.
        stride: 1 or 2.
        shortcut: ``"identity"``, ``"pad"`` or ``"projection"``.
    """

    inputs: int
    inner: int
    outputs: int
    stride: int
    shortcut: str


@dataclass(frozen=True)
class Layout:
    """A backbone with its channels cut into units.

    A grid is one way in which channels are cut; layers that share a stream share its grid.

    Attributes:
        backbone: the network.
        grids: every distinct cut.
        sliced: for every grid, whether levels narrow it.
        groups: groups of the blocks' convolutions (the number of units in mode ``"grouped"``).
        stem: grid of the stem's output.
        blocks: the blocks in order.
    """

    backbone: Backbone
    grids: tuple[ChannelUnits, ...]
    sliced: tuple[bool, ...]
    groups: int
    stem: int
    blocks: tuple[BlockLayout, ...]

    @property
    def features(self) -> int:
        """Grid of the last block's output."""
        return self.blocks[-1].outputs

    def ranges(self, units: Range) -> tuple[Range, ...]:
        """Active channels of every grid, for the units [lo, hi)."""
        return tuple(
            grid.channel_range(units) if narrow else (0, grid.channels)
            for grid, narrow in zip(self.grids, self.sliced, strict=True)
        )

    def full_ranges(self) -> tuple[Range, ...]:
        """All channels of every grid."""
        return tuple((0, grid.channels) for grid in self.grids)

    def pad_ratio(self, block: BlockLayout) -> int:
        """How many times as many channels an option-A shortcut puts out."""
        return self.grids[block.outputs].channels // self.grids[block.inputs].channels

    def pad_aligned(self, block: BlockLayout) -> bool:
        """Whether an option-A shortcut keeps every channel in its unit."""
        ratio = self.pad_ratio(block)
        inputs, outputs = self.grids[block.inputs], self.grids[block.outputs]
        return all(ratio * a == b for a, b in zip(inputs.bounds, outputs.bounds, strict=True))


def layout_of(
    backbone: Backbone, units: int = 1, slice_mode: str = "none", unit_multiple: int = 1
) -> Layout:
    """Cuts a backbone's channels into units.

    Args:
        backbone: the network.
        units: number of units k.
        slice_mode: ``"full"``: the stream and the blocks' inner channels; ``"inner"``: the inner
            channels only; ``"grouped"``: as full, without weights between units; ``"none"``.
        unit_multiple: sizes of units are multiples of this.

    Raises:
        ValueError: an unknown mode; too few channels for so many units; channels that k does not
            divide (grouped); a shortcut without weights to a width that is no multiple.
    """
    if slice_mode not in SLICE_MODES:
        raise ValueError(f"layout_of: slice_mode must be one of {SLICE_MODES}, got {slice_mode!r}")
    kinds: dict[tuple[int, bool], int] = {}

    def grid(channels: int, narrow: bool) -> int:
        if slice_mode == "grouped" and channels % units:
            raise ValueError(
                f"layout_of: widths must divide by the {units} units in slice mode 'grouped', "
                f"got {channels}"
            )
        return kinds.setdefault((channels, narrow), len(kinds))

    stream = slice_mode in ("full", "grouped")
    inner = slice_mode != "none"
    expansion = 4 if backbone.block == "bottleneck" else 1
    stem = previous = grid(backbone.stem_width, stream)
    width = backbone.stem_width
    blocks = []
    for stage, (outputs, depth) in enumerate(zip(backbone.widths, backbone.depths, strict=True)):
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            changes = stride != 1 or width != outputs
            shortcut = backbone.shortcut if changes else "identity"
            if shortcut == "pad" and outputs % width:
                raise ValueError(
                    f"layout_of: widths must be multiples of the width before for option-A "
                    f"shortcuts, got {outputs} after {width}"
                )
            output = grid(outputs, stream)
            mid = grid(outputs // expansion, inner)
            blocks.append(BlockLayout(previous, mid, output, stride, shortcut))
            previous, width = output, outputs
    grids = tuple(
        ChannelUnits(channels, units, unit_multiple) if narrow else ChannelUnits(channels, 1)
        for channels, narrow in kinds
    )
    return Layout(
        backbone,
        grids,
        tuple(narrow for _, narrow in kinds),
        units if slice_mode == "grouped" else 1,
        stem,
        tuple(blocks),
    )
