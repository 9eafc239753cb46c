"""Compressed networks on disk: their tensors, and which of their layers are not the base's."""

import copy
import os
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from pyeff._archive import load_model_tensors, model_tensors, read_archive, write_archive
from pyeff.models.described import Layers, apply_description, describe, describe_layer

_KIND = "compressed layers"


def carry_description(model: nn.Module, original: nn.Module) -> None:
    """Notes in a network how it differs from the one that it was made of, in place.

    A network of :mod:`pyeff.models` gets the ``config`` of the family ``"compressed"``, so that
    :func:`pyeff.save` takes it; others an attribute ``compressed_layers`` for :func:`save`. What
    the original itself had become before is kept.

    Args:
        model: the new network.
        original: the one that it was made of.

    Raises:
        ValueError: a layer of the new network is of a class that no description holds.
    """
    layers = describe(model, original)
    noted: Any = cast(Any, model)
    config = getattr(original, "config", None)
    if isinstance(config, dict) and "family" in config:
        base, before = config, {}
        if config["family"] == "compressed":
            base, before = config["base"], config["layers"]
        if layers or before:
            layers = _joined(model, before, layers)
            noted.config = {"family": "compressed", "base": copy.deepcopy(base), "layers": layers}
        return
    before = getattr(original, "compressed_layers", {})
    noted.compressed_layers = _joined(model, before, layers)


def _joined(model: nn.Module, before: Mapping[str, Any], changed: Layers) -> Layers:
    """What differed already, told anew, and what differs now."""
    layers = {}
    for name, entry in before.items():
        layers[name] = describe_layer(model.get_submodule(name), name, entry["kind"])
    for name, entry in changed.items():
        if not any(_holds(outer, name, before[outer]["kind"]) for outer in before):
            layers[name] = entry
    return layers


def _holds(outer: str, name: str, kind: str) -> bool:
    """Whether the entry of ``outer`` tells of the layer ``name`` as well."""
    return name == outer or (kind != "resized" and name.startswith(f"{outer}." if outer else ""))


def save(
    model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> None:
    """Saves a compressed network of any origin: tensors, and a description of its layers.

    Networks of :mod:`pyeff.models` are saved with :func:`pyeff.save`, whose file needs no base.

    Args:
        model: what :func:`pyeff.compress.shrink` or ``factorize`` returned, trained on or not.
        path: the file to write or replace; safetensors with JSON in its header, written atomically.
        extra: more to keep beside it (JSON-able), under names other than ``kind`` and ``layers``.

    Raises:
        TypeError: the network has no description.
        ValueError: ``extra`` has a name that the file itself needs.
        ImportError: safetensors is missing.

    Example:
        >>> pyeff.compress.save(small, "small.safetensors")  # doctest: +SKIP
        >>> small = pyeff.compress.load("small.safetensors", base=resnet18())  # doctest: +SKIP
    """
    layers = getattr(model, "compressed_layers", None)
    config = getattr(model, "config", None)
    if layers is None and isinstance(config, dict) and config.get("family") == "compressed":
        layers = config["layers"]
    if not isinstance(layers, dict):
        raise TypeError(
            "compress.save: model must come from shrink or factorize, got "
            f"{type(model).__name__} without a description"
        )
    own = {"kind": _KIND, "layers": layers}
    taken = sorted(set(own) & set(extra or {}))
    if taken:
        raise ValueError(f"compress.save: extra must not name {', '.join(own)}, got {taken}")
    write_archive(path, model_tensors(model), {**own, **(extra or {})})


def load(path: str | os.PathLike[str], base: nn.Module) -> nn.Module:
    """Loads what :func:`save` wrote.

    Nothing in the file is executed: it names layers of a fixed list of kinds, and their sizes.

    Args:
        path: the file.
        base: a network built as the one that was compressed was built; it is not changed, and its
            weights do not matter.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file or one of another kind; a base that it does not fit.
        ImportError: safetensors is missing.
    """
    tensors, meta = read_archive(path)
    where = os.fspath(path)
    if meta.get("kind") != _KIND:
        raise ValueError(
            f"compress.load: {where} must be written by compress.save, got {meta.get('kind')!r}"
        )
    model = apply_description(base, meta["layers"]).cpu()
    load_model_tensors(model, tensors, where)
    cast(Any, model).compressed_layers = meta["layers"]
    return model.eval()
