"""State dicts of stacked parameters in the form of n ordinary copies."""

from typing import Any

import torch
from torch import Tensor, nn

# Where the stacked layers lie in a module that uses these hooks.
STACK = "stack"


def stacked_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the stacked layers by their name in one copy."""
    return module.get_submodule(STACK).state_dict(keep_vars=True)


def split_state(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """State dict post hook: ``stack.conv.weight`` ``[n, ...]`` to ``0.conv.weight`` and so on."""
    names = stacked_tensors(module)
    stacks = {name: state.pop(f"{prefix}{STACK}.{name}", None) for name in names}
    for branch in range(module.branches):  # type: ignore[arg-type]  # an int
        for name, stack in stacks.items():
            if stack is not None:
                state[f"{prefix}{branch}.{name}"] = stack[branch]
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        _split_versions(module, versions, prefix)


def _split_versions(module: nn.Module, versions: dict[str, Any], prefix: str) -> None:
    """Gives every copy's layers the versions that torch's own layers would have written."""
    for key in [key for key in versions if f"{key}.".startswith(f"{prefix}{STACK}.")]:
        del versions[key]
    for name in {name.rpartition(".")[0] for name in stacked_tensors(module)}:
        layer = module.get_submodule(f"{STACK}.{name}" if name else STACK)
        # nn.BatchNorm2d counts batches from version 2 on; everything else is at 1.
        version = 2 if hasattr(layer, "num_batches_tracked") else 1
        for branch in range(module.branches):  # type: ignore[arg-type]  # an int
            versions[f"{prefix}{branch}.{name}".rstrip(".")] = {"version": version}


def join_state(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load pre hook: ``0.conv.weight`` and so on to ``stack.conv.weight``.

    What is missing or has another shape is reported under the name in the copy, and the layer
    keeps its value there.
    """
    for name, current in stacked_tensors(module).items():
        copies: list[Tensor] = []
        given = 0
        for branch in range(len(current)):
            key = f"{prefix}{branch}.{name}"
            value = state.pop(key, None)
            if value is None:
                missing.append(key)
            elif value.shape != current.shape[1:]:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {value.shape} from "
                    f"checkpoint, the shape in current model is {current.shape[1:]}."
                )
                value = None
            given += value is not None
            copies.append(current.detach()[branch] if value is None else value)
        if given and not current.is_meta:
            copies = [copy.to(current) for copy in copies]
        # With no copy given the value stays; with its name in place torch reports nothing more.
        state[f"{prefix}{STACK}.{name}"] = torch.stack(copies) if given else current.detach()
