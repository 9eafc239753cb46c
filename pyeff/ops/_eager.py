"""When an operator may skip the dispatcher and call its kernel straight."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True in ordinary eager mode on ordinary CPU or CUDA tensors.

    Everything that has to see the call (compilers, tracers, modes, functorch, tensor subclasses,
    autocast, forward-mode differentiation) makes it false, and the registered operator is called.
    The whole test costs about a microsecond; the dispatcher's Python route costs four to ten.
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or not (x.is_cpu or x.is_cuda)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
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
