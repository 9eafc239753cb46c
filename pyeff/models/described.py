"""How a network differs from the one that it was made of, as JSON: names of layers and their sizes.

A description holds kinds from a fixed list and numbers, never code, so that a file may be read
from anyone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyeff.nn import (
    ACBlock,
    ConvNorm2d,
    DiverseBranchBlock,
    ExpandedConv2d,
    ExpandedLinear,
    FactorizedConv2d,
    Reparam,
    RepVGGBlock,
)

Entry = dict[str, Any]  # {"kind": ..., **arguments}
Layers = dict[str, Entry]  # by the module's name

_CHANNELS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias")
_CONV = (*_CHANNELS, "groups", "padding_mode")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")

# What a description may build, with the arguments that are attributes of the same name.
_PLAIN: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **{f"Conv{n}d": (getattr(nn, f"Conv{n}d"), _CONV) for n in (1, 2, 3)},
    **{
        f"ConvTranspose{n}d": (getattr(nn, f"ConvTranspose{n}d"), (*_CONV, "output_padding"))
        for n in (1, 2, 3)
    },
    **{f"BatchNorm{n}d": (getattr(nn, f"BatchNorm{n}d"), _NORM) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": (getattr(nn, f"InstanceNorm{n}d"), _NORM) for n in (1, 2, 3)},
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "GroupNorm": (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "PReLU": (nn.PReLU, ("num_parameters",)),
    "Identity": (nn.Identity, ()),
    "ReLU": (nn.ReLU, ("inplace",)),
    "ReLU6": (nn.ReLU6, ("inplace",)),
    "SiLU": (nn.SiLU, ("inplace",)),
    "Hardswish": (nn.Hardswish, ("inplace",)),
    "GELU": (nn.GELU, ("approximate",)),
    "Dropout": (nn.Dropout, ("p", "inplace")),
    "Dropout2d": (nn.Dropout2d, ("p", "inplace")),
}
_PLAIN_TYPES: dict[type[nn.Module], str] = {getattr(nn, kind): kind for kind in _PLAIN}
_PAIR = (*_CHANNELS, "rank", "order", "inner", "norm")
_CHAIN = ("bias", "inner_bias", "widths", "form", "activation")
_BLOCK = (*(key for key in _CONV if key != "bias"), "norm_eps")

# Layers with members, likewise; what of it is no attribute is read off the members.
_WHOLE: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "FactorizedConv2d": (FactorizedConv2d, (*_PAIR, "norm_eps")),
    "ExpandedConv2d": (ExpandedConv2d, (*_CONV, *_CHAIN[1:], "mode")),
    "ExpandedLinear": (ExpandedLinear, ("in_features", "out_features", *_CHAIN)),
    "RepVGGBlock": (RepVGGBlock, _BLOCK),
    "ACBlock": (ACBlock, _BLOCK),
    "DiverseBranchBlock": (DiverseBranchBlock, (*_BLOCK, "inner_channels")),
}
_EXPANDED = (ExpandedConv2d, ExpandedLinear, Reparam)
_WHOLE_TYPES: dict[Any, str] = {make: kind for kind, (make, _) in _WHOLE.items()}
KINDS = (*_PLAIN, *_WHOLE, "Sequential", "ConvNorm2d", "resized")

# Sizes that an attribute of a layer tells.
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"),
    *("num_channels", "num_parameters", "normalized_shape", "rank"),
)


def describe(model: nn.Module, base: nn.Module) -> Layers:
    """What a network's layers are where they differ from those of the network it was made of.

    Args:
        model: the changed network.
        base: the original one, or one of its sizes (on the meta device, for example).

    Returns:
        Names of modules to ``{"kind": ..., **arguments}``, a JSON-able document for
        :func:`apply_description`. Layers whose class a description cannot build have the kind
        ``"resized"``: the base's own layer with other sizes.

    Raises:
        ValueError: a layer was replaced by one that no description holds.

    Example:
        >>> base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        >>> describe(model, base)["0"]["out_channels"]
        6
    """
    layers: Layers = {}
    _compare(model, base, "", layers)
    return layers


def _compare(model: nn.Module, base: nn.Module, name: str, layers: Layers) -> None:
    if type(model) in _PLAIN_TYPES:
        entry = _entry(model, name)
        if type(base) is not type(model) or entry != _entry(base, name):
            layers[name] = entry
        return
    children, others = dict(model.named_children()), dict(base.named_children())
    if type(model) is not type(base) or list(children) != list(others):
        layers[name] = _entry(model, name)
        return
    if isinstance(model, _EXPANDED) and _whole_arguments(model) != _whole_arguments(base):
        layers[name] = _entry(model, name)
        return
    own = _resized(model)
    if own != _resized(base):
        layers[name] = own
    for child, module in children.items():
        _compare(module, others[child], f"{name}.{child}" if name else child, layers)


def _entry(module: nn.Module, name: str) -> Entry:
    """The whole of a layer of a kind that a description builds."""
    kind = _PLAIN_TYPES.get(type(module))
    if kind is not None:
        return {"kind": kind, **{key: _value(module, key) for key in _PLAIN[kind][1]}}
    if type(module) is nn.Sequential and all(
        key == str(number) for number, key in enumerate(module._modules)
    ):
        items = [_entry(item, f"{name}.{number}") for number, item in enumerate(module)]
        return {"kind": "Sequential", "items": items}
    if type(module) in _WHOLE_TYPES:
        return _composite(module, _whole_arguments(module), name)
    if isinstance(module, ConvNorm2d):
        made = {"conv": _entry(module.conv, f"{name}.conv"), "norm_eps": module.norm.eps}
        return _composite(module, {"kind": "ConvNorm2d", **made}, name)
    raise ValueError(
        f"describe: layer {name!r} must be of a kind that a description holds "
        f"({', '.join(KINDS)}), got {type(module).__name__}"
    )


def describe_layer(layer: nn.Module, name: str, kind: str) -> Entry:
    """The entry of one layer as it is now.

    Args:
        layer: the layer.
        name: of it, for messages.
        kind: of the entry that it had: ``"resized"`` keeps its class.

    Raises:
        ValueError: a layer of a class that no description holds.
    """
    return _resized(layer) if kind == "resized" else _entry(layer, name)


def _whole_arguments(module: nn.Module) -> Entry:
    kind = _WHOLE_TYPES[type(module)]
    entry: Entry = {"kind": kind}
    read: dict[str, Any] = {}
    if isinstance(module, FactorizedConv2d):
        norm = module.norm_outer if module.norm_outer is not None else module.norm_inner
        read = {
            "bias": module.second.bias is not None,
            "in_channels": module.first.in_channels,
            "rank": module.first.out_channels,
            "out_channels": module.second.out_channels,
            "norm_eps": 1e-5 if norm is None else norm.eps,
        }
    elif isinstance(module, ExpandedConv2d | ExpandedLinear):
        first, last = module.members[0], module.members[-1]
        read = {"bias": last.bias is not None, "inner_bias": first.bias is not None}
    elif isinstance(module, Reparam):
        read = {"norm_eps": module.branches.get_submodule("conv.norm").eps}
    for key in _WHOLE[kind][1]:
        entry[key] = read[key] if key in read else _value(module, key)
    return entry


def _composite(module: nn.Module, entry: Entry, name: str) -> Entry:
    """A layer with members: its arguments, and the members that are not what these give."""
    with torch.device("meta"):
        made = _build(entry, name)
    changed: Layers = {}
    for child, member in module.named_children():
        _compare(member, made.get_submodule(child), child, changed)
    return {**entry, "layers": changed} if changed else entry


def _value(module: nn.Module, key: str) -> Any:
    value = getattr(module, key)
    if key == "bias":
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def _resized(module: nn.Module) -> Entry:
    """The sizes of a layer whose class a description cannot build: attributes and own tensors."""
    sizes = {key: _value(module, key) for key in _SIZES if key in vars(module)}
    tensors = {key: None if t is None else list(t.shape) for key, t in module._parameters.items()}
    tensors |= {key: None if t is None else list(t.shape) for key, t in module._buffers.items()}
    return {"kind": "resized", "sizes": sizes, "tensors": tensors}


def apply_description(base: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The network that :func:`describe` described, with fresh weights in the layers that differ.

    Args:
        base: the network as it was before; it is not changed.
        layers: the description.

    Returns:
        A new network on the base's device and of its dtype.

    Raises:
        ValueError: names that the base does not have, unknown kinds, arguments that a kind does
            not take.

    Example:
        >>> base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> layers = {"1": {"kind": "Identity"}}
        >>> type(apply_description(base, layers)[1]).__name__
        'Identity'
    """
    if not isinstance(layers, Mapping):
        raise ValueError(f"apply_description: layers must be a mapping, got {layers!r}")
    model = copy.deepcopy(base)
    for name in sorted(layers, key=lambda name: name.count(".") if name else -1):
        entry = layers[name]
        if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
            raise ValueError(
                f"apply_description: {name!r} must have a kind of {', '.join(KINDS)}, got {entry!r}"
            )
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"apply_description: layers must name modules of the base, got {name!r}"
            ) from error
        if entry["kind"] == "resized":
            _resize(old, entry, name)
            continue
        new = _like(_build(entry, name), old, model)
        if not name:
            model = new
        else:
            # A layer that has several names is one layer.
            for alias, module in list(model.named_modules(remove_duplicate=False)):
                if module is old:
                    replace_layer(model, alias, new)
    return model


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of the one called ``name``."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = layer


def _like(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """A new layer in the mode, and where and in what precision the network's tensors are."""
    for tensor in (*old.parameters(), *model.parameters()):
        if tensor.is_floating_point():
            new = new.to(tensor.device, tensor.dtype)
            break
    return new.train(old.training)


def _build(entry: Mapping[str, Any], name: str) -> nn.Module:
    """The layer of an entry, with fresh weights."""
    if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
        raise ValueError(
            f"apply_description: {name!r} must have a kind of {', '.join(KINDS)}, got {entry!r}"
        )
    arguments = {key: value for key, value in entry.items() if key not in ("kind", "layers")}
    kind = entry["kind"]
    if kind == "Sequential":
        items = arguments.get("items")
        if not isinstance(items, Sequence) or set(arguments) != {"items"}:
            raise ValueError(f"apply_description: {name!r} must have a list of items, got {entry}")
        return nn.Sequential(*(_build(item, f"{name}.{i}") for i, item in enumerate(items)))
    if kind == "ConvNorm2d":
        arguments["conv"] = _build(arguments.get("conv", {}), f"{name}.conv")
        allowed: tuple[str, ...] = ("conv", "norm_eps")
        make: Callable[..., nn.Module] = ConvNorm2d
    elif kind in _PLAIN or kind in _WHOLE:
        make, allowed = _PLAIN[kind] if kind in _PLAIN else _WHOLE[kind]
    else:
        raise ValueError(f"apply_description: {name!r} must be a layer of its own, got {kind!r}")
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        raise ValueError(
            f"apply_description: {name!r} must have arguments of {kind} "
            f"({', '.join(allowed)}), got {', '.join(unknown)}"
        )
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        made = make(**plain)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"apply_description: {name!r} must be a {kind} that can be made, got {arguments} "
            f"({error})"
        ) from error
    changed = entry.get("layers")
    return made if changed is None else apply_description(made, changed)


@torch.no_grad()
def _resize(module: nn.Module, entry: Mapping[str, Any], name: str) -> None:
    sizes, tensors = entry.get("sizes", {}), entry.get("tensors", {})
    known = set(module._parameters) | set(module._buffers)
    wrong = [k for k in sizes if k not in _SIZES or k not in vars(module)]
    wrong += [k for k in tensors if k not in known]
    if wrong:
        raise ValueError(
            f"apply_description: {name!r} must be resized by what {type(module).__name__} has, "
            f"got {', '.join(wrong)}"
        )
    for key, size in sizes.items():
        if _value(module, key) != size:
            setattr(module, key, tuple(size) if isinstance(size, list) else size)
    changed = False
    for key, shape in tensors.items():
        old = module._parameters.get(key, module._buffers.get(key))
        if shape == (None if old is None else list(old.shape)):
            continue
        changed = True
        like = next((t for t in module.parameters(recurse=False)), torch.empty(()))
        fresh = None if shape is None else _fitted(like if old is None else old, shape)
        if key in module._parameters:
            module._parameters[key] = None if fresh is None else nn.Parameter(fresh)
        else:
            module._buffers[key] = fresh
    reset = getattr(module, "reset_parameters", None)
    if changed and callable(reset):
        reset()


def _fitted(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of another shape whose values are among the old one's."""
    if old.dim() != len(shape):
        return old.new_zeros(tuple(shape))
    for axis, size in enumerate(shape):
        take = torch.arange(size, device=old.device) % max(old.shape[axis], 1)
        old = old.index_select(axis, take)
    return old.clone()
