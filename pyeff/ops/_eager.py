"""When an operator may skip the dispatcher and call its kernel straight."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)

# Bound once: looking a name up through torch's modules at every call costs as much as the function.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_dispatch_mode = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> bool:
    """True in ordinary eager mode on ordinary CPU or CUDA tensors.

    Everything that has to see the call (compilers, tracers, modes, functorch, tensor subclasses,
    autocast, forward-mode differentiation) makes it false, and the registered operator is called.
    So does a lazily negated view, whose sign the dispatcher applies and DLPack would lose.
    The whole test costs about a microsecond; the dispatcher's Python route costs four to ten.
    """
    return not (
        _is_compiling()
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or not (x.is_cpu or x.is_cuda)
        or x.is_neg()
        or weight.is_neg()
        or (bias is not None and bias.is_neg())
        or any(t is not None and (type(t) not in _PLAIN or t.is_neg()) for t in others)
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or _autocast()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def needs_composition() -> bool:
    """True where PyTorch cannot differentiate a registered operator.

    Functorch's transforms and forward-mode differentiation go through the plain PyTorch form.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def is_traced() -> bool:
    """Whether tensors may stand for others: compilers, tracers, fake tensors, functorch, jvp.

    A value computed from such must not be kept, nor one that was kept be used among them.
    """
    return (
        _is_compiling()
        or _functorch_level() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or _dispatch_mode(_FAKE) is not None
        or _dispatch_mode(_PROXY) is not None
    )
