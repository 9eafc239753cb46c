"""A linear layer that trains as three and runs as one."""

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.contraction import Kernel, compose_linear, without_autocast
from pyeff.nn.expansion_cost import linear_forms, trains_faster_contracted
from pyeff.nn.expansion_plan import check_form, inner_widths
from pyeff.nn.expansion_start import start_cl
from pyeff.nn.factorized_conv2d import check_activation
from pyeff.nn.folding import FoldsNorms, called, reads_own_weight
from pyeff.reference.factorized_conv2d import activation as activate

_OP = "ExpandedLinear"
_Affine = tuple[Tensor, Tensor | None]


class ExpandedLinear(FoldsNorms[_Affine]):
    """Three linear layers, with nothing between them, in place of one: they equal one.

    As :class:`ExpandedConv2d`, with the same two forms: in contracted form the weights are
    composed and one matrix product of the compact size runs. In eval mode without gradient a layer
    always runs as the one that :meth:`contract` gives.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``. Without a bias no
            member has one.
        rate: the expansion r. Features between the members are r * in_features and
            r * out_features.
        widths: these two numbers themselves.
        form: ``"auto"``, ``"expanded"`` or ``"contracted"``.
        activation: after the first and the second member: ``"relu"``, ``"relu6"``, ``"silu"`` or
            ``"hardswish"``. Such a chain cannot be contracted; its state is a start for the linear
            one.
        inner_bias: whether the first two have a bias too, where the layer has one.

    Attributes:
        members: the three ``nn.Linear``, in an ``nn.ModuleList``.
        widths: features between the members.

    Raises:
        ValueError: a size out of range, an unknown form or activation, the contracted form with an
            activation.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020.

    Example:
        >>> ExpandedLinear(8, 2, rate=4).contract()
        Linear(in_features=8, out_features=2, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rate: float = 4,
        widths: Sequence[int] | None = None,
        form: str = "auto",
        activation: str | None = None,
        inner_bias: bool = True,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"{_OP}: in_features and out_features must be positive, got {in_features} and "
                f"{out_features}"
            )
        check_activation(_OP, "activation", activation)
        check_form(_OP, form, activation)
        self.in_features, self.out_features = in_features, out_features
        self.activation, self._form = activation, form
        self.widths = inner_widths(_OP, 3, (in_features, out_features), 1, rate, widths)
        features = (in_features, *self.widths, out_features)
        self.members = nn.ModuleList(
            nn.Linear(features[i], features[i + 1], bias and (inner_bias or i == 2), device, dtype)
            for i in range(3)
        )

    @property
    def form(self) -> str:
        """``"auto"``, ``"expanded"`` or ``"contracted"``; may be set."""
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        check_form(_OP, form, self.activation)
        self._form = form

    @classmethod
    @torch.no_grad()
    def from_compact(
        cls,
        linear: nn.Linear,
        *,
        rate: float = 4,
        widths: Sequence[int] | None = None,
        form: str = "auto",
        inner_bias: bool = True,
        noise: float = 1.0,
    ) -> "ExpandedLinear":
        """An expanded layer that computes what a linear layer computes.

        It exists where both widths are at least the rank of the weight.

        Args:
            linear: is not changed.
            rate, widths, form, inner_bias: as above.
            noise: as in :meth:`ExpandedConv2d.from_compact`.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
            ValueError: widths that do not suffice; the message says which would.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{_OP}: linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            linear.weight.device,
            linear.weight.dtype,
            rate=rate,
            widths=widths,
            form=form,
            inner_bias=inner_bias,
        )
        kernels = [Kernel(weight[:, :, None, None]) for weight, _ in layer._pairs(torch.float64)]
        weights = start_cl(_OP, linear.weight[:, :, None, None], kernels, noise)
        for member, weight in zip(layer._layers, weights, strict=True):
            member.weight.copy_(weight[:, :, 0, 0])
        if linear.bias is not None:
            last = layer._layers[-1]
            last.bias.zero_()
            passed = layer.composed(torch.float64)[1]
            last.bias.copy_(linear.bias if passed is None else linear.bias.double() - passed)
        layer.requires_grad_(any(p.requires_grad for p in linear.parameters()))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: ``[..., in_features]``.

        Returns:
            ``[..., out_features]``
        """
        if isinstance(x, Proxy) or not self.is_whole or not self._runs_contracted(x):
            for i, member in enumerate(self.members):
                x = member(activate(x, self.activation) if i else x)
            return x
        weight, bias = self._folded_for(x)
        return F.linear(x, weight, bias)

    @property
    def _layers(self) -> list[nn.Linear]:
        """The members as what they are unless someone replaced one."""
        return [member for member in self.members if isinstance(member, nn.Linear)]

    @property
    def is_whole(self) -> bool:
        """Whether the chain is linear and its members are plain linear layers."""
        return super().is_whole and self.activation is None and self._odd_member() is None

    def _odd_member(self) -> nn.Module | None:
        return next((m for m in self.members if not reads_own_weight(m, nn.Linear)), None)

    def _runs_contracted(self, x: Tensor) -> bool:
        if not self.training and not torch.is_grad_enabled():
            return True
        if self._form != "auto":
            return self._form == "contracted"
        # A compiled program serves more than one batch. Without gradients the weight is kept.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return True
        features = (self.in_features, *self.widths, self.out_features)
        return trains_faster_contracted(linear_forms(features, prod(x.shape[:-1])), x)

    def _pairs(self, dtype: torch.dtype | None = None) -> list[_Affine]:
        found: list[_Affine] = []
        for member in self._layers:
            bias = member.bias if dtype is None or member.bias is None else member.bias.to(dtype)
            found.append((member.weight if dtype is None else member.weight.to(dtype), bias))
        return found

    def _folded_tensors(self) -> list[Tensor]:
        return list(self.members.parameters())

    def _fold(self) -> _Affine:
        # Halves would round the product of the first two members.
        return self._rounded(torch.promote_types(self._layers[0].weight.dtype, torch.float32))

    def _fold_once(self) -> _Affine:
        with torch.inference_mode(False), torch.no_grad():
            return self._rounded(torch.float64)

    def _rounded(self, dtype: torch.dtype) -> _Affine:
        """Composed in a dtype, in that of the members."""
        own = self._layers[0].weight.dtype
        weight, bias = self.composed(dtype)
        return weight.to(own), None if bias is None else bias.to(own)

    def composed(self, dtype: torch.dtype | None = None) -> _Affine:
        """Weight and bias that the chain equals, differentiable with respect to the members.

        Args:
            dtype: to compute in and to return; that of the members by default.

        Raises:
            ValueError: there is an activation between the members.
            TypeError: a member is no plain ``nn.Linear``.
        """
        if self.activation is not None:
            raise ValueError(
                f"{_OP}: activation must be None to contract, as no linear layer equals a chain "
                f"with one, got {self.activation!r}; load its state into a linear layer first"
            )
        odd = self._odd_member()
        if odd is not None:
            raise TypeError(
                f"{_OP}: members must be plain nn.Linear to contract, got {called(odd)}"
            )
        pairs = self._pairs(dtype)
        with without_autocast(pairs[0][0]):
            if self.in_features <= self.out_features:
                return reduce(compose_linear, pairs)
            return reduce(lambda second, first: compose_linear(first, second), reversed(pairs))

    @torch.no_grad()
    def contract(self) -> nn.Linear:
        """The linear layer that the chain equals, computed in float64.

        Returns:
            An ``nn.Linear`` with the dtype, device and training flag of this layer, with a bias
            where any member has one; it requires gradients where any parameter does.

        Raises:
            ValueError: there is an activation between the members.
            TypeError: a member is no plain ``nn.Linear``.
        """
        weight, bias = self.composed(torch.float64)
        own = self._layers[0].weight
        linear = nn.utils.skip_init(
            nn.Linear,
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            device=own.device,
            dtype=own.dtype,
        )
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        linear.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return linear.train(self.training)

    def product_norm(self) -> Tensor:
        """Sum of the squares of the contracted weight, 0-d, differentiable.

        Raises:
            ValueError, TypeError: as :meth:`contract`.
        """
        return self.composed()[0].square().sum()

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        inner = "" if self.activation is None else f", activation={self.activation}"
        size = f"{self.in_features}, {self.out_features}"
        return f"{size}, widths={self.widths}, form={self.form}{inner}"
