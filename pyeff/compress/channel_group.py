"""Tied channels: which parameters are theirs, gathered as the rows of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = nn.Module | Mapping[str, Tensor]

PRODUCER, NORM, SCALE, CONSUMER = "producer", "norm", "scale", "consumer"


@dataclass(frozen=True, eq=False)
class Member:
    """A layer's part in a group.

    Attributes:
        name: of the module, or of the parameter for one that belongs to no layer that is known.
        role: ``"producer"`` (a convolution or linear layer whose filters make the channels),
            ``"norm"`` (a batch or instance norm of them), ``"scale"`` (a PReLU or a parameter with
            one number for each of them) or ``"consumer"`` (a layer that reads them).
        index: ``[channels, width]``, int64 on the CPU: the layer's output channels (input channels
            for a consumer) that belong to each channel of the group. A linear layer after a
            flattened H x W map has H * W of them.
        axis: the dimension of a parameter that ``index`` counts; 0 for modules.
    """

    name: str
    role: str
    index: Tensor
    axis: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """The part of a parameter that belongs to a group: some of its rows, one or more a channel.

    Attributes:
        parameter: its name.
        index: ``[channels, width]``, rows in terms of output channels.
        groups: of a transposed convolution, whose weight ``[C_in, C_out / groups, ...]`` is turned;
            0 for every other parameter, whose dimension 0 counts output channels.
        size: numbers in a row.
    """

    parameter: str
    index: Tensor
    groups: int
    size: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Tied output channels of one or more layers: what is removed together or not at all.

    Its unit is a *channel*: the same position of every layer whose outputs are summed, scaled or
    multiplied with each other. A grouped convolution ties all that enters or leaves one of its
    groups, so that a channel of its group of channels is a whole group of the convolution.

    Attributes:
        name: of the first producer, in the order of ``model.named_modules()``; where a layer's
            channels belong to several groups, followed by ``#`` and a number.
        channels: how many there are.
        members: every layer that the channels concern.
        rows: the parameters that are the group's: filters and biases, and the scales and shifts of
            norms where ``include_norm`` asked for them.
        include_norm: whether it did.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    rows: tuple[Rows, ...]
    include_norm: bool

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the layers whose filters make the channels."""
        return self._named(PRODUCER)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the batch and instance norms of the channels."""
        return self._named(NORM)

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the layers that read the channels."""
        return self._named(CONSUMER)

    def _named(self, role: str) -> tuple[str, ...]:
        return tuple(member.name for member in self.members if member.role == role)

    @property
    def size(self) -> int:
        """P: how many parameters a channel has."""
        return sum(rows.index.shape[1] * rows.size for rows in self.rows)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of which the group has rows."""
        return tuple(rows.parameter for rows in self.rows)

    def gather(self, source: Tensors) -> Tensor:
        """The group's parameters, a row for each channel.

        Args:
            source: the model, or tensors of the parameters' shapes by their names (gradients,
                momenta).

        Returns:
            ``[channels, P]``, a copy.

        Raises:
            ValueError: a tensor is missing.
        """
        tensors = _named_tensors(source)
        parts = []
        for rows in self.rows:
            turned = _turned(_tensor(tensors, rows.parameter), rows.groups)
            index = rows.index.to(turned.device)
            parts.append(turned.detach()[index].reshape(self.channels, -1))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def write(self, target: Tensors, matrix: Tensor) -> None:
        """Writes what :meth:`gather` gave, changed or not, back in place.

        Args:
            target: the model, or tensors by their names.
            matrix: ``[channels, P]``.

        Raises:
            ValueError: a matrix of another shape; a tensor is missing.
        """
        if matrix.shape != (self.channels, self.size):
            raise ValueError(
                f"ChannelGroup: matrix must be [{self.channels}, {self.size}], got "
                f"{list(matrix.shape)}"
            )
        tensors = _named_tensors(target)
        parts = matrix.split([rows.index.shape[1] * rows.size for rows in self.rows], 1)
        for rows, part in zip(self.rows, parts, strict=True):
            _write_rows(_tensor(tensors, rows.parameter), rows, rows.index, part)

    @torch.no_grad()
    def clear(self, target: Tensors, channels: Tensor) -> None:
        """Sets the parameters of some channels to zero, in place.

        Args:
            target: the model, or tensors by their names; those that it lacks are passed over.
            channels: bool ``[channels]``: which.
        """
        tensors = _named_tensors(target)
        chosen = channels.cpu()
        if not chosen.any():
            return
        for rows in self.rows:
            if rows.parameter in tensors:
                _write_rows(tensors[rows.parameter], rows, rows.index[chosen], None)

    def dead(self, source: Tensors) -> Tensor:
        """Which channels have nothing but zeros: filters, biases, and norms where included.

        Returns:
            bool ``[channels]``, on the parameters' device.
        """
        tensors = _named_tensors(source)
        found = [
            _turned(_tensor(tensors, rows.parameter).detach(), rows.groups)
            .flatten(1)
            .eq(0)
            .all(1)[rows.index.to(tensors[rows.parameter].device)]
            .all(1)
            for rows in self.rows
        ]
        return torch.stack(found).all(0)


def _named_tensors(source: Tensors) -> Mapping[str, Tensor]:
    return dict(source.named_parameters()) if isinstance(source, nn.Module) else source


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"ChannelGroup: tensors must hold {name}, got none of that name")
    return tensors[name]


def _turned(tensor: Tensor, groups: int) -> Tensor:
    """``[C_out, ...]``, whatever the parameter; at least two dimensions."""
    if groups:
        grid = tensor.unflatten(0, (groups, -1)).transpose(1, 2)  # [g, C_out / g, C_in / g, ...]
        return grid.flatten(0, 1)
    return tensor if tensor.dim() > 1 else tensor[:, None]


def _write_rows(tensor: Tensor, rows: Rows, index: Tensor, values: Tensor | None) -> None:
    """Overwrites rows of a parameter, with zeros for ``values`` None."""
    at = index.flatten().to(tensor.device)
    if values is None and not rows.groups:
        tensor.index_fill_(0, at, 0)
        return
    whole = _turned(tensor.detach(), rows.groups).clone()
    whole[at] = 0 if values is None else values.reshape(-1, *whole.shape[1:]).to(whole.dtype)
    if rows.groups:
        whole = whole.unflatten(0, (rows.groups, -1)).transpose(1, 2).flatten(0, 1)
    tensor.copy_(whole.view(tensor.shape) if tensor.dim() == 1 else whole)
