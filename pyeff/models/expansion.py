"""What networks with a plan of expansion share: which of their layers become chains, and costs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyeff.measure import LevelCost, measure_cost
from pyeff.nn import ExpandedConv2d, ExpandedLinear, Reparam

_ACTIVATIONS = (None, "relu")
_FORMS = ("auto", "expanded", "contracted")


@dataclass(frozen=True)
class Expansion:
    """How the layers of a plan are expanded.

    Attributes:
        conv: chain of the plan's convolutions, ``"cl"`` or ``"ck"``; ``None``: they stay plain.
        linear: whether the plan's linear layers become chains as well.
        rate: widths of the chains over those of the plain layers (the paper's r).
        activation: ``"relu"`` puts a ReLU after each inner member: the form that is trained first
            for the paper's "+Init", and cannot be contracted.
        form: how a chain runs in training, see :class:`pyeff.nn.ExpandedConv2d`.
    """

    conv: str | None
    linear: bool
    rate: float
    activation: str | None
    form: str

    def layer(self, plain: nn.Conv2d, first: int | None = None) -> nn.Conv2d | ExpandedConv2d:
        """A convolution of the plan, as a chain if the plan is for one.

        Args:
            plain: what the chain contracts to. A 3 x 3 convolution has no chain ``"ck"`` and is
                returned as it is.
            first: channels after the first member, in place of ``rate`` times the inputs.
        """
        if self.conv is None or (self.conv == "ck" and plain.kernel_size[0] <= 3):
            return plain
        return ExpandedConv2d(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,
            plain.stride,
            plain.padding,
            plain.dilation,
            plain.groups,
            plain.bias is not None,
            mode=self.conv,
            rate=self.rate,
            widths=None if first is None else self._widths(plain, first),
            form=self.form,
            activation=self.activation,
        )

    def _widths(self, plain: nn.Conv2d, first: int) -> tuple[int, ...]:
        """Channels between the members, with another number after the first."""
        members = 3 if self.conv == "cl" else (plain.kernel_size[0] - 1) // 2
        return (first, *[max(1, round(self.rate * plain.out_channels))] * (members - 2))

    def dense(self, plain: nn.Linear) -> nn.Linear | ExpandedLinear:
        """A linear layer of the plan, as a chain if the plan is for one."""
        if not self.linear:
            return plain
        return ExpandedLinear(
            plain.in_features,
            plain.out_features,
            plain.bias is not None,
            rate=self.rate,
            form=self.form,
            activation=self.activation,
        )


def expansion_of(
    family: str,
    expand: str | None,
    allowed: Sequence[str],
    *,
    rate: float,
    activation: str | None,
    form: str,
) -> Expansion:
    """Reads the options of expansion that every family of networks takes.

    Args:
        family: of the network, for messages.
        expand: ``None`` for the plain network, or parts with a plus between: ``"cl"`` or ``"ck"``
            for convolutions, ``"fc"`` for linear layers.
        allowed: what ``expand`` may be beside ``None``.
        rate, activation, form: see :class:`Expansion`.

    Raises:
        ValueError: another value.
    """
    if expand is not None and expand not in allowed:
        known = ", ".join(["None", *map(repr, allowed)])
        raise ValueError(f"{family}: expand must be one of {known}, got {expand!r}")
    if not rate > 0:
        raise ValueError(f"{family}: rate must be positive, got {rate}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{family}: activation must be None or 'relu', got {activation!r}")
    if activation is not None and expand is None:
        raise ValueError(f"{family}: activation must be None without expand, got {activation!r}")
    if form not in _FORMS:
        raise ValueError(f"{family}: form must be one of {', '.join(_FORMS)}, got {form!r}")
    parts = () if expand is None else tuple(expand.split("+"))
    conv = next((part for part in parts if part != "fc"), None)
    return Expansion(conv, "fc" in parts, rate, activation, form)


class ExpandableNet(nn.Module):
    """A network whose layers can be trained as chains and run as plain layers.

    Attributes:
        config: keyword arguments of :func:`pyeff.models.build` that rebuild the network.
        in_channels: of the images.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.in_channels: int = config["in_channels"]

    def check(self, x: Tensor, smallest: int = 1) -> None:
        """Refuses what is no batch of images for this network.

        Args:
            x: ``[N, C, H, W]``.
            smallest: rows and columns that are needed.

        Raises:
            ValueError: another shape; no image at all in training.
        """
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < smallest:
            raise ValueError(
                f"{name}: x must be [N, {self.in_channels}, H, W] with at least {smallest} rows "
                f"and columns, got {list(x.shape)}"
            )
        if self.training and x.shape[0] == 0:
            raise ValueError(f"{name}: x must hold an image in training, got none")

    def costs(self, input_size: tuple[int, int] = (224, 224)) -> LevelCost:
        """What one image costs at run time, where every linear chain is the one layer it equals.

        Args:
            input_size: (H, W).

        Raises:
            ValueError: a size that is too small.
        """
        # A copy, as compression and expansion may have changed the layers.
        return measure_cost(as_it_runs(self).to("meta").eval(), (self.in_channels, *input_size))


def as_it_runs(model: ExpandableNet) -> nn.Module:
    """A copy of a network with every expanded layer contracted; chains with activations stay.

    Args:
        model: the network; not changed.
    """
    # What deepcopy takes for the copy of a layer, in every place that the layer has.
    memo: dict[int, Any] = {}
    for layer in model.modules():
        chain = isinstance(layer, ExpandedConv2d | ExpandedLinear)
        if isinstance(layer, Reparam) or (chain and layer.activation is None):
            memo[id(layer)] = layer.contract()
    return copy.deepcopy(model, memo)
