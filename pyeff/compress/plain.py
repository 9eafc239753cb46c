"""Networks as modules of torch's own operators, for where pyeff is not installed."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyeff.compress.layer_calls import Example, arguments_of, output_of, relative_difference
from pyeff.nn.folding import layers_apart

_OP = "plain_module"


def plain_module(model: nn.Module, example: Example) -> nn.Module:
    """A copy of a network that runs torch's own operators alone, in eval mode.

    Layers of pyeff that run as one call are taken apart into convolutions, norms and activations.
    The result needs no pyeff: ``torch.export.save(torch.export.export(plain, (x,)), path)`` writes
    it for another machine, and compilers see every layer.

    Args:
        model: compressed or not; it is not changed.
        example: its input, a tensor or several, with the batch in dimension 0. Other numbers of
            images may be given later where the network allows it; other sizes may not.

    Returns:
        A ``torch.fx.GraphModule`` with the network's parameters and buffers under their names.

    Raises:
        ValueError: the network cannot be exported, or has operators that are not torch's.

    Example:
        >>> net = nn.Sequential(pyeff.nn.FactorizedConv2d(3, 8, 3), nn.ReLU())
        >>> plain_module(net, torch.randn(1, 3, 8, 8))(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 8, 6, 6])
    """
    from torch.export import Dim, export

    given = arguments_of(example)
    whole = copy.deepcopy(model).eval()
    # One image would be taken for the only number there is.
    inputs = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in given)
    shapes = tuple({0: Dim.AUTO} if x.dim() else None for x in inputs)
    try:
        with layers_apart(), torch.no_grad():
            program = export(whole, inputs, dynamic_shapes=shapes)
    except Exception as error:
        # Whatever torch.export stumbles over.
        raise ValueError(
            f"{_OP}: model must be one that torch.export takes, got {type(error).__name__}: {error}"
        ) from error
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    others = sorted({t.name() for t in overloads if t.namespace != "aten"})
    if others:
        raise ValueError(f"{_OP}: model must be made of torch's operators, got {', '.join(others)}")
    plain = program.module()
    _check_equal(plain, whole, inputs)
    return plain


def _check_equal(plain: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    wanted = output_of(model, inputs)
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(plain(*inputs)) if isinstance(leaf, Tensor)]
    apart = relative_difference(found, wanted)
    # Norms that are not folded round in other places.
    if not apart <= 1e4 * max(torch.finfo(t.dtype).eps for t in wanted if t.is_floating_point()):
        raise ValueError(
            f"{_OP}: model must compute the same when it is exported, got outputs {apart:.1e} apart"
        )
