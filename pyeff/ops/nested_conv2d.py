"""Convolution with a part of one weight that is shared by many nested levels."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyeff._C import call_key
from pyeff.ops import _nested_conv2d_backends as backends
from pyeff.ops._conv_args import Pair, padding_sides, pair
from pyeff.ops._dispatch import choose, forced_backend
from pyeff.ops._eager import is_plain, needs_composition
from pyeff.ops._nested_conv2d_backends import OP, Conv, Selection
from pyeff.ops._nested_conv2d_op import NestedConv2d, forward_op, lower
from pyeff.ops._weak_cache import WeakTensorCache


def nested_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_range: Pair | None = None,
    out_range: Pair | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | str | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    validate: bool = False,
) -> Tensor:
    r"""Convolves with selected channels of a full weight, which is never sliced or copied.

    .. math:: y = \mathrm{conv2d}(x,\; W[o_0{:}o_1,\, i_0{:}i_1],\; b[o_0{:}o_1])

    With an index in place of a range, :math:`W[\mathrm{out\_index}][:, \mathrm{in\_index}]`.

    Args:
        x: Input, ``[N, i, H, W]``, exactly the selected channels. Best in channels_last, of which
            any strides are read as they are; other layouts are converted once.
        weight: Full weight :math:`W`, ``[O, I / groups, kh, kw]``, dtype and device of ``x``.
        bias: Full bias :math:`b`, ``[O]``, or None.
        in_range: Half-open range of input channels, in channels of the full layer; all by default.
            With ``groups > 1`` both ranges must cover the same whole groups.
        out_range: Likewise for output channels.
        in_index: 1-D int32 or int64 channel numbers without duplicates, in place of ``in_range``;
            ``groups`` must be 1.
        out_index: Likewise in place of ``out_range``.
        stride: One or two ints.
        padding: One or two ints, "same" (stride 1 only) or "valid", as in torch.nn.Conv2d.
        dilation: One or two ints.
        groups: Of the full layer.
        validate: Also checks the values of index tensors on a GPU, which synchronises. On the CPU
            they are always checked.

    Returns:
        ``[N, o, H', W']``, channels_last, dtype and device of ``x``; aliases nothing.

    Raises:
        ValueError: If shapes, ranges, dtypes or devices do not fit together.
        TypeError: If an argument is no tensor, or not of a floating-point dtype.

    Twice differentiable in ``x``, ``weight`` and ``bias``; the gradients of ``weight`` and
    ``bias`` have the full shape and are exactly zero outside of the selection. Deterministic.

    Source: Kim et al., "Deep Virtual Networks for Memory Efficient Inference of Multiple Tasks",
    CVPR 2019 (nested subsets of one parameter set).

    Example:
        >>> weight = torch.randn(64, 32, 3, 3)
        >>> x = torch.randn(1, 8, 28, 28)  # the first quarter of the 32 input channels
        >>> nested_conv2d(x, weight, in_range=(0, 8), out_range=(0, 16), padding=1).shape
        torch.Size([1, 16, 28, 28])
    """
    plain = is_plain(x, weight, bias)
    if plain and in_index is None and out_index is None:
        plan = _known_plan(x, weight, bias, in_range, out_range, stride, padding, dilation, groups)
    else:
        conv = _checked(
            (x, weight, bias),
            (in_range, in_index),
            (out_range, out_index),
            stride,
            padding,
            dilation,
            groups,
            validate=validate,
        )
        if not plain:
            if needs_composition():
                return backends.compose(x, weight, bias, conv)
            result: Tensor = forward_op(x, weight, bias, *lower(conv))
            return result
        plan = _Plan(conv, None)

    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return NestedConv2d.apply(x, weight, bias, plan.conv)
    if plan.cpp is not None:
        return backends.cpp_forward(plan.cpp, x, weight, bias)
    return backends.forward(x, weight, bias, plan.conv)


# --- repeated calls -------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """A checked call: what to run, and the cpp backend's form of it where that will run."""

    conv: Conv
    cpp: backends.CppCall | None


_MAX_PLANS = 4096
_plans: dict[Hashable, _Plan] = {}


def _known_plan(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> _Plan:
    """The plan of a call with ranges; checking it again costs more than a small convolution.

    The key holds everything that the checks and the choice of a backend depend on.
    """
    try:
        key = (call_key(x, weight, bias), options, torch.get_num_threads(), forced_backend())
        plan = _plans.get(key)
    except (TypeError, ValueError, RuntimeError):
        # Tensors that no kernel takes, or a list instead of a tuple: the checks accept it or say
        # what is wrong.
        return _make_plan(x, weight, bias, *options)
    if plan is None:
        plan = _make_plan(x, weight, bias, *options)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _make_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_range: Pair | None,
    out_range: Pair | None,
    *options: Any,
) -> _Plan:
    conv = _checked((x, weight, bias), (in_range, None), (out_range, None), *options)
    cpp = backends.cpp_call(x, weight, conv) if choose(OP, x) == "cpp" else None
    return _Plan(conv, cpp)


# --- arguments ------------------------------------------------------------------------------------


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    inputs: tuple[Pair | None, Tensor | None],  # range, index
    outputs: tuple[Pair | None, Tensor | None],
    stride: int | Pair,
    padding: int | str | Pair,
    dilation: int | Pair,
    groups: int,
    *,
    validate: bool = False,
) -> Conv:
    """The arguments in one form, after every check of the public function."""
    x, weight, _ = tensors
    _check_tensors(*tensors)
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups != 0:
        raise ValueError(
            f"{OP}: groups must be at least 1 and divide the weight's {weight.shape[0]} output "
            f"channels, got {groups!r}"
        )
    stride = pair(OP, "stride", stride, 1)
    dilation = pair(OP, "dilation", dilation, 1)
    sides = padding_sides(OP, padding, (weight.shape[2], weight.shape[3]), stride, dilation)
    selected_in = _selection("in", *inputs, weight.shape[1] * groups, weight, validate)
    selected_out = _selection("out", *outputs, weight.shape[0], weight, validate)
    conv = Conv(selected_in, selected_out, stride, sides, dilation, groups)
    _check_shapes(x, weight, conv)
    return conv


def _require(condition: bool, message: Callable[[], str]) -> None:
    # Under a compiler sizes and ranges may be symbols, which only torch._check can test.
    if torch.compiler.is_compiling():
        torch._check(condition)
    elif not condition:
        raise ValueError(f"{OP}: {message()}")


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        wrong = ("x", x) if not isinstance(x, Tensor) else ("weight", weight)
        raise TypeError(f"{OP}: {wrong[0]} must be a tensor, got {type(wrong[1]).__name__}")
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"{OP}: x must be [N, i, H, W] and weight [O, I / groups, kh, kw], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{OP}: x must be a floating-point tensor, got {x.dtype}")
    if weight.device != x.device:
        raise ValueError(
            f"{OP}: weight must be on the device of x, {x.device}, got {weight.device}"
        )
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{OP}: bias must be a tensor or None, got {type(bias).__name__}")
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{OP}: bias must be [{weight.shape[0]}], one for each output channel of the "
                f"full weight, got {list(bias.shape)}"
            )
        if bias.device != x.device:
            raise ValueError(
                f"{OP}: bias must be on the device of x, {x.device}, got {bias.device}"
            )
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        _check_dtypes(x, weight, bias)


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # Under autocast the registered operator casts its arguments; otherwise they must agree.
    if torch.is_autocast_enabled(x.device.type):
        return
    got = f"{x.dtype}, {weight.dtype}" + ("" if bias is None else f", {bias.dtype}")
    raise ValueError(f"{OP}: x, weight and bias must share one dtype, got {got}")


def _selection(
    side: str,
    given: Pair | None,
    index: Tensor | None,
    channels: int,
    weight: Tensor,
    validate: bool,
) -> Selection:
    if index is not None:
        if given is not None:
            raise ValueError(f"{OP}: {side}_range and {side}_index must not both be given")
        return _index(side, index, channels, weight, validate)
    if given is None:
        return (0, channels)
    if len(given) != 2:
        raise ValueError(f"{OP}: {side}_range must be (lo, hi), got {given!r}")
    lo, hi = given
    for condition in (lo >= 0, lo < hi, hi <= channels):
        _require(
            condition,
            lambda: f"{side}_range must be (lo, hi) with 0 <= lo < hi <= {channels}, got {given}",
        )
    return (lo, hi)


_valid_indices: WeakTensorCache[Tensor] = WeakTensorCache()


def _index(side: str, index: Tensor, channels: int, weight: Tensor, validate: bool) -> Tensor:
    name = f"{side}_index"
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{OP}: {name} must be an int32 or int64 tensor, got {kind}")
    if index.dim() != 1 or index.shape[0] == 0:
        raise ValueError(
            f"{OP}: {name} must be 1-D and name at least one channel, got shape {list(index.shape)}"
        )
    if index.device != weight.device:
        raise ValueError(
            f"{OP}: {name} must be on the device of weight, {weight.device}, got {index.device}"
        )
    known_values = type(index) is Tensor and not torch.compiler.is_compiling()
    if not known_values or not (index.is_cpu or (validate and index.is_cuda)):
        return index.to(torch.int64).contiguous()

    def check(index: Tensor) -> Tensor:
        if int(index.min()) < 0 or int(index.max()) >= channels:
            raise ValueError(
                f"{OP}: {name} must name channels 0 to {channels - 1} of weight, got values from "
                f"{int(index.min())} to {int(index.max())}"
            )
        if index.unique().numel() != index.numel():
            raise ValueError(f"{OP}: {name} must not name a channel twice, got {index.tolist()}")
        # A copy, so that the cached value does not keep its own key alive.
        return index.to(torch.int64, copy=True).contiguous()

    return _valid_indices.get_or_compute(index, check)


def _check_shapes(x: Tensor, weight: Tensor, conv: Conv) -> None:
    if conv.groups > 1:
        _check_groups(weight, conv)
    selected = backends.count(conv.in_selection)
    _require(
        x.shape[1] == selected,
        lambda: f"x must have the {selected} selected input channels, got {x.shape[1]}",
    )
    height, width = conv.output_shape(x, weight)[2:]
    _require(
        height > 0 and width > 0,
        lambda: (
            f"x must be at least as large as the kernel, got {list(x.shape)} for kernel "
            f"{list(weight.shape[2:])}, padding {conv.padding} and dilation {conv.dilation}"
        ),
    )


def _check_groups(weight: Tensor, conv: Conv) -> None:
    inputs, outputs = conv.in_selection, conv.out_selection
    if isinstance(inputs, Tensor) or isinstance(outputs, Tensor):
        raise ValueError(f"{OP}: groups must be 1 with an index, got {conv.groups}")
    in_group, out_group = weight.shape[1], weight.shape[0] // conv.groups
    for i, o in zip(inputs, outputs, strict=True):
        _require(
            i % in_group == 0 and o % out_group == 0 and i // in_group == o // out_group,
            lambda: (
                f"in_range and out_range must cover the same whole groups of {in_group} and "
                f"{out_group} channels, got {inputs} and {outputs}"
            ),
        )
