"""Batch norms in eval mode: a scale and a shift, which a layer folds into its weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyeff.nn.derived import DerivedValue
from pyeff.ops import clear_packed
from pyeff.ops._eager import is_traced

T = TypeVar("T")

_apart = False


@contextlib.contextmanager
def layers_apart() -> Iterator[None]:
    """Within it, layers that fold or fuse call their convolutions and norms one by one.

    What hooks on those layers need, for example to find which channels are tied. The results are
    the same up to rounding.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def are_layers_apart() -> bool:
    """Whether this is within :func:`layers_apart`."""
    return _apart


def is_affine(norm: nn.BatchNorm2d | None) -> bool:
    """Whether the norm uses its running statistics, so that it can be folded; True for none."""
    return norm is None or (not norm.training and norm.running_mean is not None)


def norm_tensors(norm: nn.BatchNorm2d | None) -> list[Tensor]:
    """All tensors that tell whether :func:`norm_affine` would give something else than before."""
    if norm is None:
        return []
    # PyTorch's batch norm moves the statistics without a new version; it counts the batch, though.
    counted = norm.num_batches_tracked
    found = (norm.running_mean, norm.running_var, norm.weight, norm.bias, counted)
    return [tensor for tensor in found if tensor is not None]


def norm_affine(
    norm: nn.BatchNorm2d, precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The scale and the shift that the norm applies in eval mode.

    Args:
        norm: one with running statistics.
        precision: to compute in at least; halves would lose what the sums keep.

    Returns:
        Two tensors ``[C]``, in the precision or that of the statistics.

    Raises:
        ValueError: a norm without running statistics.
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("norm_affine: norm must have running statistics, got one without")
    dtype = torch.promote_types(mean.dtype, precision)
    scale = torch.rsqrt(variance.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -mean.to(dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def reads_own_weight(layer: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether a layer computes what its class does from the weight and the bias that it holds.

    Not so where a forward pre-hook writes them (``weight_norm``, ``spectral_norm``, ``prune``) or
    changes the input; parametrizations are fine, they compute on access.
    """
    held = layer._parameters.keys() | getattr(layer, "parametrizations", {}).keys()
    return (
        type(layer).forward is plain.forward
        and held >= {"weight", "bias"}
        and not layer._forward_pre_hooks
    )


def called(layer: nn.Module) -> str:
    """A layer's type, and whether hooks run before it; for errors."""
    hooks = " with hooks that run before it" if layer._forward_pre_hooks else ""
    return f"{type(layer).__name__}{hooks}"


class FoldsNorms(nn.Module, Generic[T]):
    """A layer that computes its weights in eval mode anew only when a tensor of it changed.

    Under a compiler, a tracer or a transform of torch.func it computes them at every call. What
    writes through ``.data`` is not seen until :meth:`train` or :meth:`eval` changes the mode, an
    optimiser takes a step or ``pyeff.clear_packed`` is called.

    A subclass says what the folded form is (:meth:`_fold`) and which tensors it reads
    (:meth:`_folded_tensors`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: DerivedValue[T] = DerivedValue()

    @property
    def is_whole(self) -> bool:
        """Whether its convolutions are plain ones, whose weights it may read.

        One that :func:`pyeff.compress.factorize` put two layers in the place of, or
        ``pyeff.convert.expand`` a larger one, is called instead, as all are within
        :func:`layers_apart`.
        """
        return not _apart and not any(
            isinstance(member, nn.Sequential | FoldsNorms) for member in self._modules.values()
        )

    def _fold(self) -> T:
        """The folded form, differentiable."""
        raise NotImplementedError("FoldsNorms: _fold is what a subclass brings")

    def _folded_tensors(self) -> list[Tensor]:
        """All tensors that :meth:`_fold` reads."""
        raise NotImplementedError("FoldsNorms: _folded_tensors is what a subclass brings")

    def _folded_for(self, *inputs: Tensor | None) -> T:
        """The folded form for a call with ``inputs``: kept, or computed where gradients flow."""
        tensors = self._folded_tensors()
        if is_traced() or (
            torch.is_grad_enabled()
            and any(t.requires_grad for t in (*inputs, *tensors) if t is not None)
        ):
            return self._fold()
        return self._held.get(tensors, self._fold_once)

    def _fold_once(self) -> T:
        # Inference tensors have no version, and no packed copy of them would be kept.
        with torch.inference_mode(False), torch.no_grad():
            return self._fold()

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``. An update by hand between the modes may have been unseen."""
        if mode != self.training:
            self._held.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving a parameter changes its memory but not its version.
        super()._apply(fn, recurse)
        self._held.clear()
        for parameter in self.parameters():
            clear_packed(parameter)
        return self
