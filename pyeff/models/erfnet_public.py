"""Checkpoints of the public PyTorch ERFNet, by the names that its state dict has."""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyeff.models.erfnet import ERFNet
from pyeff.nn import Downsampler, FactorizedConv2d, NonBottleneck1d, Upsampler

_OP = "load_public_state_dict"
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class DroppedParametersWarning(UserWarning):
    """A checkpoint holds parameters that the network has no place for by design."""


def public_names(model: ERFNet) -> dict[str, str]:
    """For every name in the network's state dict, its name in the public checkpoints.

    The names of a pair's members go by their shape (conv3x1_1 is n x 1), so that
    ``order="horizontal_first"`` reads checkpoints that were trained in that order.

    Args:
        model: an ERFNet of pairs.
    """
    names: dict[str, str] = {}
    for ours, theirs, part in _parts(model):
        for inner, public in _layer_names(part):
            names[f"{ours}.{inner}"] = f"{theirs}.{public}"
    return names


def load_public_state_dict(model: ERFNet, state: Mapping[str, Tensor]) -> ERFNet:
    """Copies a checkpoint of the public PyTorch ERFNet into a network of the same sizes.

    The encoder's own head, which those checkpoints carry along, has no place in a whole network:
    it is dropped, and a :class:`DroppedParametersWarning` says so. A network with ``encoder_only``
    takes the encoder and its head, and drops a decoder.

    Args:
        model: an :func:`~pyeff.models.erfnet`, changed in place.
        state: name to tensor, with or without the prefix ``module.``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ERFNet.
        ValueError: tensors are missing, unknown or of another shape (the message lists them); a
            network of dense convolutions.

    Example:
        >>> state = torch.load("erfnet.pth", weights_only=True)  # doctest: +SKIP
        >>> model = load_public_state_dict(erfnet(classes=20), state)  # doctest: +SKIP
    """
    if not isinstance(model, ERFNet):
        raise TypeError(f"{_OP}: model must be an ERFNet, got {type(model).__name__}")
    if model.config["dense"]:
        raise ValueError(f"{_OP}: model must be made of pairs, got one of dense convolutions")
    found = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    # The encoder's head has a place only where it is the output; the decoder only where it is not.
    spare = "decoder." if model.head is not None else "encoder.output_conv."
    dropped = [name for name in found if name.startswith(spare)]
    for name in dropped:
        del found[name]
    wanted = model.state_dict()
    names = public_names(model)
    known = set(names.values())
    loaded: dict[str, Tensor] = {}
    trouble = [f"unknown {name}" for name in found if name not in known]
    for ours, public in names.items():
        if public not in found:
            # Checkpoints from before PyTorch 0.4.1 do not count batches.
            if public.endswith("num_batches_tracked"):
                loaded[ours] = torch.zeros_like(wanted[ours])
            else:
                trouble.append(f"missing {public}")
        elif found[public].shape != wanted[ours].shape:
            trouble.append(
                f"{public} is {list(found[public].shape)}, the model has {list(wanted[ours].shape)}"
            )
        else:
            loaded[ours] = found[public]
    if trouble:
        shown = "; ".join(trouble[:8]) + (f"; and {len(trouble) - 8} more" if trouble[8:] else "")
        raise ValueError(f"{_OP}: state must hold the tensors of this model, got: {shown}")
    model.load_state_dict(loaded)
    if dropped:
        warnings.warn(
            f"{_OP}: dropped {', '.join(dropped[:4])}{' ...' if dropped[4:] else ''}: "
            "the network has no place for them",
            DroppedParametersWarning,
            stacklevel=2,
        )
    return model


def _parts(model: ERFNet) -> Iterator[tuple[str, str, nn.Module]]:
    """Every layer of the network: our name, the public one, and the layer."""
    for index, layer in enumerate(model.encoder):
        public = "encoder.initial_block" if index == 0 else f"encoder.layers.{index - 1}"
        yield f"encoder.{index}", public, layer
    if model.head is not None:
        yield "head", "encoder.output_conv", model.head
    if model.decoder is not None:
        *layers, last = model.decoder
        for index, layer in enumerate(layers):
            yield f"decoder.{index}", f"decoder.layers.{index}", layer
        yield f"decoder.{len(layers)}", "decoder.output_conv", last


def _layer_names(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Names within one layer: ours and the public ones."""
    if isinstance(layer, Downsampler | Upsampler):
        yield from ((f"conv.{name}", f"conv.{name}") for name in ("weight", "bias"))
        yield from ((f"norm.{name}", f"bn.{name}") for name in _NORM)
    elif isinstance(layer, NonBottleneck1d):
        for number, pair in ((1, layer.conv1), (2, layer.conv2)):
            if not isinstance(pair, FactorizedConv2d):
                raise ValueError(f"{_OP}: model must be made of pairs, got {type(pair).__name__}")
            shapes = ("3x1", "1x3") if pair.order == "vertical_first" else ("1x3", "3x1")
            for member, shape in zip(("first", "second"), shapes, strict=True):
                for name in ("weight", "bias"):
                    yield f"conv{number}.{member}.{name}", f"conv{shape}_{number}.{name}"
            for name in _NORM:
                yield f"conv{number}.norm_outer.{name}", f"bn{number}.{name}"
    else:
        yield from ((name, name) for name in ("weight", "bias"))
