"""A convolution that trains as a chain of linear ones and runs as a single one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pyeff.nn.contraction import Kernel, compose_all, without_autocast
from pyeff.nn.expansion_cost import conv_forms, trains_faster_contracted
from pyeff.nn.expansion_plan import (
    PADDING_MODES,
    MemberPlan,
    check_channels,
    check_choice,
    check_form,
    choose_mode,
    inner_widths,
    input_edges,
    is_symmetric,
    pair_of,
    plan_members,
)
from pyeff.nn.expansion_start import start_ck, start_cl
from pyeff.nn.factorized_conv2d import check_activation
from pyeff.nn.folding import FoldsNorms, called, reads_own_weight
from pyeff.reference.factorized_conv2d import activation as activate

_OP = "ExpandedConv2d"


class ExpandedConv2d(FoldsNorms[Kernel]):
    """A chain of convolutions, with nothing between them, in place of one: it equals one.

    The members are ordinary ``nn.Conv2d``. They are trained together; :meth:`contract` then gives
    the one convolution that equals the chain, at the borders too: all padding is on the first
    member.

    A layer has two forms that compute the same and have the same gradients. ``"expanded"`` runs the
    members. ``"contracted"`` composes their weights, differentiably, and runs one convolution of
    the compact size: the map between the members is never made, so a step costs about what the
    compact layer costs where maps have many pixels. ``"auto"`` takes the one that a model of their
    times calls faster; that is the contracted one but for maps of few pixels, and always on a GPU,
    where nothing was measured. In eval mode without gradient a layer always runs as the one
    convolution that :meth:`contract` gives, whose kernel it keeps (a compiled program composes it
    at every call: contract first). Forward hooks on the members see calls in expanded form only;
    with hooks that run before a member, ``nn.utils.prune`` among them, a layer always runs member
    by member and cannot be contracted.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in ``nn.Conv2d``. Without a bias no member has one.
        mode: ``"cl"`` (1 x 1, the kernel, 1 x 1; any kernel), ``"ck"`` (3 x 3 members; odd kernels
            with a side of 5 or more; where a side is used up, 3 x 1 or 1 x 3) or ``"auto"`` (ck
            for odd square kernels beyond 3 x 3, cl for others).
        rate: the expansion r. Channels between the members are r * in_channels after the first and
            r * out_channels after the others, rounded to multiples of the groups.
        widths: these channels themselves, one number fewer than members.
        form: ``"auto"``, ``"expanded"`` or ``"contracted"``, as above.
        activation: after each member but the last: ``"relu"``, ``"relu6"``, ``"silu"`` or
            ``"hardswish"``. Such a chain cannot be contracted. Its state is a start for the linear
            layer, which has the same keys ("+Init" in the paper).
        inner_bias: whether members but the last have a bias too, where the layer has one.

    Attributes:
        members: the chain, an ``nn.ModuleList``.
        mode: ``"cl"`` or ``"ck"``.
        widths: channels between the members.

    Raises:
        ValueError: a size out of range, an unknown mode, form or activation, a kernel that mode ck
            cannot make, the contracted form with an activation.

    Source: Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact
    Convolutional Networks", NeurIPS 2020.

    Example:
        >>> layer = ExpandedConv2d(3, 8, 7, padding=3, rate=4)
        >>> [member.out_channels for member in layer.members]
        [12, 32, 8]
        >>> layer.contract()
        Conv2d(3, 8, kernel_size=(7, 7), stride=(1, 1), padding=(3, 3))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "auto",
        rate: float = 4,
        widths: Sequence[int] | None = None,
        form: str = "auto",
        activation: str | None = None,
        inner_bias: bool = True,
    ) -> None:
        super().__init__()
        check_channels(_OP, in_channels, out_channels, groups)
        check_choice(_OP, "padding_mode", padding_mode, PADDING_MODES)
        check_activation(_OP, "activation", activation)
        check_form(_OP, form, activation)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair_of(_OP, "kernel_size", kernel_size, 1)
        self.stride = pair_of(_OP, "stride", stride, 1)
        self.dilation = pair_of(_OP, "dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else pair_of(_OP, "padding", padding, 0)
        self.padding_mode, self.activation, self._form = padding_mode, activation, form
        self.mode = choose_mode(_OP, mode, self.kernel_size)
        self._edges = input_edges(_OP, self.padding, self.kernel_size, self.stride, self.dilation)
        plan = plan_members(self.mode, self.kernel_size, self.stride, self.dilation)
        channels = (in_channels, out_channels)
        self.widths = inner_widths(_OP, len(plan), channels, groups, rate, widths)
        self.members = nn.ModuleList()
        self._add_members(plan, bias, inner_bias, {"device": device, "dtype": dtype})

    def _add_members(
        self, plan: list[MemberPlan], bias: bool, inner_bias: bool, made: dict[str, Any]
    ) -> None:
        channels = (self.in_channels, *self.widths, self.out_channels)
        around: Any = self.padding_mode
        for i, member in enumerate(plan):
            pads = i == 0 and is_symmetric(self._edges)
            self.members.append(
                nn.Conv2d(
                    channels[i],
                    channels[i + 1],
                    member.kernel_size,
                    member.stride,
                    (self._edges[2], self._edges[0]) if pads else 0,
                    member.dilation,
                    self.groups,
                    bias and (inner_bias or i == len(plan) - 1),
                    around if pads else "zeros",
                    **made,
                )
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
        conv: nn.Conv2d,
        *,
        mode: str = "auto",
        rate: float = 4,
        widths: Sequence[int] | None = None,
        form: str = "auto",
        inner_bias: bool = True,
        noise: float = 1.0,
    ) -> "ExpandedConv2d":
        """An expanded layer that computes what a convolution computes.

        One member is solved for, the others are random; the last bias makes up for the inner ones.

        Mode cl can do so where the inner channels of a group are at least as many as the ranks of
        its weight, unfolded by inputs and by outputs; widths that are no smaller than the layer's
        own channels always suffice. Mode ck needs several channels between the members for each
        channel of the layer, so that filters of 3 x 3 span the kernel's taps: rate 4 does for 5 x 5
        to 9 x 9, and for 11 x 11 with no more inputs than outputs.

        Args:
            conv: is not changed.
            mode, rate, widths, form, inner_bias: as above.
            noise: size of random numbers, in those of a usual start, that are added where they do
                not change the function. Without them most of the expansion starts unused.

        Returns:
            A layer with the convolution's arguments, dtype, device and training flag.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``.
            ValueError: widths that do not suffice; the message says which would.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{_OP}: conv must be an nn.Conv2d, got {type(conv).__name__}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            mode=mode,
            rate=rate,
            widths=widths,
            form=form,
            inner_bias=inner_bias,
        )
        start = start_cl if layer.mode == "cl" else start_ck
        weights = start(_OP, conv.weight, layer._kernels(torch.float64), noise)
        for member, weight in zip(layer.convs, weights, strict=True):
            member.weight.copy_(weight)
        last = layer.convs[-1]
        if conv.bias is not None and last.bias is not None:
            last.bias.zero_()
            passed = layer.composed(torch.float64).bias
            last.bias.copy_(conv.bias if passed is None else conv.bias.double() - passed)
        layer.requires_grad_(any(p.requires_grad for p in conv.parameters()))
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.

        Args:
            x: ``[N, C, H, W]`` or ``[C, H, W]``.

        Returns:
            What ``nn.Conv2d`` with the same arguments would give the shape of.
        """
        if isinstance(x, Proxy) or not self.is_whole or not self._runs_contracted(x):
            return self._by_members(x)
        return self._convolve(x, self._folded_for(x))

    @property
    def convs(self) -> list[nn.Conv2d]:
        """The members that are convolutions, which is all unless someone replaced one."""
        return [member for member in self.members if isinstance(member, nn.Conv2d)]

    @property
    def is_whole(self) -> bool:
        """Whether the chain is linear and its members are plain convolutions."""
        return super().is_whole and self.activation is None and self._odd_member() is None

    def _odd_member(self) -> nn.Module | None:
        return next((m for m in self.members if not reads_own_weight(m, nn.Conv2d)), None)

    def _runs_contracted(self, x: Tensor) -> bool:
        if not self.training and not torch.is_grad_enabled():
            return True
        if self._form != "auto":
            return self._form == "contracted"
        # A compiled program serves more than one size. Without gradients the kernel is kept.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return True
        return trains_faster_contracted(conv_forms(self._kernels(), x, self._edges), x)

    def _by_members(self, x: Tensor) -> Tensor:
        if not is_symmetric(self._edges):
            x = self._padded(x)
        for i, member in enumerate(self.members):
            x = member(activate(x, self.activation) if i else x)
        return x

    def _convolve(self, x: Tensor, kernel: Kernel) -> Tensor:
        """The one convolution."""
        padding = (self._edges[2], self._edges[0])
        if self.padding_mode != "zeros" or not is_symmetric(self._edges):
            x, padding = self._padded(x), (0, 0)
        window = (self.stride, padding, self.dilation, self.groups)
        return F.conv2d(x, kernel.weight, kernel.bias, *window)

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._edges, mode)

    def _kernels(self, dtype: torch.dtype | None = None) -> list[Kernel]:
        return [Kernel.of(member, dtype) for member in self.convs]

    def _folded_tensors(self) -> list[Tensor]:
        tensors = [tensor for conv in self.convs for tensor in (conv.weight, conv.bias)]
        return [tensor for tensor in tensors if tensor is not None]

    def _fold(self) -> Kernel:
        # Halves would round the products of each pair of members.
        dtype = self.convs[0].weight.dtype
        return self.composed(torch.promote_types(dtype, torch.float32)).to(dtype)

    def _fold_once(self) -> Kernel:
        with torch.inference_mode(False), torch.no_grad():
            return self.composed(torch.float64).to(self.convs[0].weight.dtype)

    def composed(self, dtype: torch.dtype | None = None) -> Kernel:
        """The kernel that the chain equals, differentiable with respect to the members.

        Args:
            dtype: to compute in and to return; that of the members by default.

        Raises:
            ValueError: there is an activation between the members.
            TypeError: a member is no plain ``nn.Conv2d``.
        """
        if self.activation is not None:
            raise ValueError(
                f"{_OP}: activation must be None to contract, as no convolution equals a chain "
                f"with one, got {self.activation!r}; load its state into a linear layer first"
            )
        odd = self._odd_member()
        if odd is not None:
            raise TypeError(
                f"{_OP}: members must be plain nn.Conv2d to contract, got {called(odd)}"
            )
        with without_autocast(self.convs[0].weight):
            return compose_all(self._kernels(dtype))

    @torch.no_grad()
    def contract(self) -> nn.Conv2d:
        """The convolution that the chain equals, computed in float64.

        Returns:
            An ``nn.Conv2d`` with the dtype, device and training flag of this layer, with a bias
            where any member has one; it requires gradients where any parameter does.

        Raises:
            ValueError: there is an activation between the members.
            TypeError: a member is no plain ``nn.Conv2d``.
        """
        kernel = self.composed(torch.float64)
        weight = self.convs[0].weight
        outputs, inputs = kernel.shape[:2]
        conv = nn.utils.skip_init(
            nn.Conv2d,
            inputs * self.groups,
            outputs,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            kernel.bias is not None,
            self.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        conv.weight.copy_(kernel.weight)
        if kernel.bias is not None:
            conv.bias.copy_(kernel.bias)
        conv.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return conv.train(self.training)

    def product_norm(self) -> Tensor:
        """Sum of the squares of the contracted weight, 0-d, differentiable.

        Half of it, times a factor, is weight decay on the product. Decay of the members is
        something else: it favours products of low rank.

        Raises:
            ValueError, TypeError: as :meth:`contract`.
        """
        return self.composed().weight.square().sum()

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        inner = "" if self.activation is None else f", activation={self.activation}"
        return f"{size}, mode={self.mode}, widths={self.widths}, form={self.form}{inner}"
