"""BranchPlan: a whole branch as data, which one call runs for every (image, branch) pair."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._branch_native import Known
from pyeff.ops._branch_steps import ACTIVATIONS, OP, Shape, Step, decode, encode, fuse, result_shape
from pyeff.ops._conv_args import Pair, padding_sides, pair


class BranchPlan:
    """The steps of a branch and the stacked parameters of all B branches; for inference.

    A plan is built by its methods, in the order in which the branch computes. Every method appends
    one step and returns the number of the *slot* that holds its result; slot 0 is the branch's
    input. A slot is a map ``[C, H, W]`` or a vector ``[F]``, and can be read by any number of later
    steps. H and W are those of the call, so that one plan serves inputs of any size. Activations
    and additions may be steps of their own: they are moved into the convolution before them where
    that is possible.

    Every parameter is stacked ``[B, ...]`` over the branches and shares one dtype and device. The
    plan keeps references to them; where it runs on the CPU they are copied once, into the order
    in which the kernel reads them, for each version of their values. Inference tensors, which have
    no version, are copied when the plan is built.

    Args:
        branches: How many branches there are, B.
        in_channels: Channels of the input map, or features of the input vector.
        vector: The input is a vector ``[in_channels]`` and no map.

    Attributes:
        branches, in_channels, vector: As given.
        steps: The steps so far, see :class:`pyeff.ops._branch_steps.Step`.
        output: The slot that the call returns: the newest, unless ``returns`` was called.

    Raises:
        ValueError: By every method, if a slot, shape, dtype, device or number does not fit.
        TypeError: If a parameter is no floating-point tensor.

    Example:
        >>> plan = BranchPlan(branches=20, in_channels=32)
        >>> a = plan.conv2d(0, torch.randn(20, 16, 32, 3, 3), padding=1, stride=2)
        >>> a = plan.activation(a, "relu")
        >>> b = plan.conv2d(a, torch.randn(20, 16, 16, 3, 3), torch.randn(20, 16), padding=1)
        >>> shortcut = plan.conv2d(0, torch.randn(20, 16, 32, 1, 1), stride=2)
        >>> _ = plan.activation(plan.add(b, shortcut), "relu")
        >>> plan.output_shape((32, 16, 16))
        (16, 8, 8)
    """

    def __init__(self, branches: int, in_channels: int, *, vector: bool = False) -> None:
        for name, value in (("branches", branches), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"BranchPlan: {name} must be an int from 1 on, got {value!r}")
        self.branches = branches
        self.in_channels = in_channels
        self.vector = vector
        self.steps: list[Step] = []
        self.output = 0
        # Of every slot: its channels (None where they depend on H and W), and if it is a vector.
        self._slots: list[tuple[int | None, bool]] = [(in_channels, vector)]
        self._lowered: tuple[list[Tensor], list[int]] | None = None
        self._output_shapes: dict[Shape, Shape] = {}
        # Of the calls: what their checks found out, and the form of the plan that the CPU runs.
        self.calls: dict[Hashable, Any] = {}
        self.native: Known | None = None

    # --- steps ------------------------------------------------------------------------------------

    def conv2d(
        self,
        source: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | Pair = 1,
        padding: int | str | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
    ) -> int:
        """Convolution with ``weight`` ``[B, O, C / groups, kh, kw]`` and ``bias`` ``[B, O]``.

        A batch norm in evaluation belongs into weight and bias. Depth-wise if ``groups`` is C.
        """
        channels = self._map(source, "conv2d")
        weight = self._parameter("weight", weight, (None,) * 4)
        out, per_group, *kernel = weight.shape[1:]
        if not isinstance(groups, int) or groups < 1 or channels % groups or out % groups:
            raise ValueError(
                f"BranchPlan.conv2d: groups must divide the {channels} input and {out} output "
                f"channels, got {groups!r}"
            )
        if per_group * groups != channels or min(out, *kernel) < 1:
            raise ValueError(
                f"BranchPlan.conv2d: weight must be [{self.branches}, O, {channels // groups}, kh, "
                f"kw] for slot {source} of {channels} channels, got {list(weight.shape)}"
            )
        stride = pair("BranchPlan.conv2d", "stride", stride, 1)
        dilation = pair("BranchPlan.conv2d", "dilation", dilation, 1)
        size = (kernel[0], kernel[1])
        options = {
            "out": out,
            "kernel": size,
            "stride": stride,
            "padding": padding_sides("BranchPlan.conv2d", padding, size, stride, dilation),
            "dilation": dilation,
            "groups": groups,
        }
        return self._append("conv2d", (source,), (weight, self._bias(bias, out)), options, out)

    def linear(self, source: int, weight: Tensor, bias: Tensor | None = None) -> int:
        """``weight`` ``[B, O, F]`` times a vector slot, plus ``bias`` ``[B, O]``."""
        features = self._slot(source, "linear", vector=True)
        weight = self._parameter("weight", weight, (None, features))
        out = weight.shape[1]
        options = {"out": out, "features": weight.shape[2]}
        tensors = (weight, self._bias(bias, out))
        return self._append("linear", (source,), tensors, options, out, vector=True)

    def scale_shift(self, source: int, scale: Tensor, shift: Tensor) -> int:
        """``x * scale + shift`` for each channel, both ``[B, C]``.

        For a norm that no convolution comes before, as in pre-activation blocks and DenseNets.
        """
        channels, vector = self._slots[self._known(source, "scale_shift")]
        tensors = tuple(
            self._parameter(name, t, (channels,))
            for name, t in (("scale", scale), ("shift", shift))
        )
        options = {"channels": tensors[0].shape[1]}
        return self._append("scale_shift", (source,), tensors, options, channels, vector=vector)

    def activation(self, source: int, name: str) -> int:
        """ "relu", "relu6", "silu" or "hardswish"."""
        if name not in ACTIVATIONS[1:]:
            raise ValueError(
                f"BranchPlan.activation: name must be one of {', '.join(ACTIVATIONS[1:])}, "
                f"got {name!r}"
            )
        channels, vector = self._slots[self._known(source, "activation")]
        slot = self._append("activation", (source,), (), {}, channels, vector=vector)
        self.steps[-1] = self.steps[-1]._replace(activation=name)
        return slot

    def add(self, first: int, second: int) -> int:
        """The sum of two slots of one shape; nothing is broadcast."""
        a, b = (self._slots[self._known(s, "add")] for s in (first, second))
        if a[1] != b[1] or (a[0] != b[0] and None not in (a[0], b[0])):
            raise ValueError(
                f"BranchPlan.add: both slots must have one shape, got slot {first} of {a[0]} and "
                f"slot {second} of {b[0]} channels"
            )
        return self._append("add", (first, second), (), {}, a[0], vector=a[1])

    def max_pool2d(
        self,
        source: int,
        kernel: int | Pair,
        *,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        ceil_mode: bool = False,
    ) -> int:
        """As torch.nn.MaxPool2d: outside of the map there is nothing."""
        return self._pool(source, kernel, stride, padding, dilation, (False, ceil_mode, False))

    def avg_pool2d(
        self,
        source: int,
        kernel: int | Pair,
        *,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> int:
        """As torch.nn.AvgPool2d."""
        flags = (True, ceil_mode, count_include_pad)
        return self._pool(source, kernel, stride, padding, 1, flags)

    def adaptive_pool2d(self, source: int, size: int | Pair = 1, *, average: bool = True) -> int:
        """Average or maximum over ``size`` bins; size 1 pools the whole map to ``[C, 1, 1]``."""
        channels = self._map(source, "adaptive_pool2d")
        sides = pair("BranchPlan.adaptive_pool2d", "size", size, 1)
        options = {"average": int(average), "size": sides}
        return self._append("adaptive_pool2d", (source,), (), options, channels)

    def flatten(self, source: int) -> int:
        """A map ``[C, H, W]`` as the vector ``[C * H * W]``, in this order; a vector as it is."""
        channels, vector = self._slots[self._known(source, "flatten")]
        return self._append(
            "flatten", (source,), (), {}, channels if vector else self._flat(source), vector=True
        )

    def concat(self, sources: Sequence[int]) -> int:
        """Maps of one size, or vectors, one after the other along their channels."""
        if len(sources) == 0:
            raise ValueError("BranchPlan.concat: sources must name at least one slot, got none")
        slots = [self._slots[self._known(s, "concat")] for s in sources]
        if len({vector for _, vector in slots}) != 1:
            raise ValueError("BranchPlan.concat: sources must be all maps or all vectors, got both")
        counts = [channels for channels, _ in slots if channels is not None]
        total = sum(counts) if len(counts) == len(slots) else None
        return self._append("concat", tuple(sources), (), {}, total, vector=slots[0][1])

    def returns(self, slot: int) -> None:
        """Makes ``slot`` the result in place of the newest one."""
        self.output = self._known(slot, "returns")
        self._changed()

    # --- use --------------------------------------------------------------------------------------

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """``[C', H', W']`` or ``[F']`` of the result for an input ``[C, H, W]`` or ``[F]``.

        Raises:
            ValueError: If an input of this shape does not fit the steps.
        """
        key = tuple(shape)
        known = self._output_shapes.get(key) if all(type(size) is int for size in key) else None
        if known is None:
            known = self.shapes(key)[self.output]
            if all(type(size) is int for size in key):
                self._output_shapes[key] = known
        return known

    def shapes(self, shape: Sequence[int]) -> list[Shape]:
        """The shape of every slot for an input ``[C, H, W]`` or ``[F]``; raises as output_shape."""
        shapes = self._checked_input(tuple(shape))
        for step in self.steps:
            shapes.append(result_shape(step, shapes))
        return shapes

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Of the convolutions and linear steps of one branch, for an input ``[C, H, W]``."""
        shapes = self.shapes(shape)
        total = 0
        for step, result in zip(self.steps, shapes[1:], strict=True):
            if step.kind == "linear":
                total += result[0] * step.options["features"]
            elif step.kind == "conv2d":
                kernel_h, kernel_w = step.options["kernel"]
                per_group = shapes[step.sources[0]][0] // step.options["groups"]
                total += result[0] * result[1] * result[2] * per_group * kernel_h * kernel_w
        return total

    def lower(self) -> tuple[list[Tensor], list[int]]:
        """The plan as tensors and integers, with activations and additions fused."""
        if self._lowered is None:
            if self.output == 0:
                raise ValueError(f"{OP}: plan must have at least one step, got none")
            steps, output = fuse(self.steps, self.output)
            header = (self.branches, self.in_channels, int(self.vector), output)
            self._lowered = encode(steps, header)
        return self._lowered

    @staticmethod
    def raised(tensors: Sequence[Tensor], program: Sequence[int]) -> "BranchPlan":
        """The plan that was lowered to these, nothing checked again."""
        (branches, in_channels, vector, output), steps = decode(tensors, program)
        plan = BranchPlan(branches, in_channels, vector=bool(vector))
        plan.steps, plan.output = steps, output
        plan._lowered = list(tensors), list(program)
        return plan

    def parameters(self) -> list[Tensor]:
        """Every tensor of the steps."""
        return [t for step in self.steps for t in step.tensors if t is not None]

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its own parameters.
        return {**self.__dict__, "_lowered": None, "native": None, "calls": {}}

    def __repr__(self) -> str:
        kinds = ", ".join(step.kind for step in self.steps)
        return f"BranchPlan(branches={self.branches}, in_channels={self.in_channels}: {kinds})"

    # --- checks -----------------------------------------------------------------------------------

    def _checked_input(self, shape: Shape) -> list[Shape]:
        if len(shape) != (1 if self.vector else 3) or shape[0] != self.in_channels:
            words = "[{}]" if self.vector else "[{}, H, W]"
            raise ValueError(
                f"{OP}: x must give every branch {words.format(self.in_channels)}, "
                f"got {list(shape)}"
            )
        if not self.vector and (shape[1] < 1 or shape[2] < 1):
            raise ValueError(
                f"{OP}: x must have maps of at least one pixel, got {list(shape)} a branch"
            )
        return [shape]

    def _known(self, slot: int, method: str) -> int:
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < len(self._slots):
            raise ValueError(
                f"BranchPlan.{method}: source must be a slot from 0 to {len(self._slots) - 1}, "
                f"got {slot!r}"
            )
        return slot

    def _slot(self, slot: int, method: str, vector: bool) -> int | None:
        channels, is_vector = self._slots[self._known(slot, method)]
        if is_vector != vector:
            wanted, got = ("a vector", "a map") if vector else ("a map", "a vector")
            raise ValueError(f"BranchPlan.{method}: source must be {wanted}, got {got}")
        return channels

    def _map(self, slot: int, method: str) -> int:
        channels = self._slot(slot, method, vector=False)
        assert channels is not None  # only vectors depend on H and W
        return channels

    def _flat(self, slot: int) -> int | None:
        """Features of a flattened map, where its size is known without the input's."""
        step = self.steps[slot - 1] if slot > 0 else None
        if step is None or step.kind != "adaptive_pool2d":
            return None
        height, width = step.options["size"]
        return self._map(slot, "flatten") * height * width

    def _pool(
        self,
        source: int,
        kernel: int | Pair,
        stride: int | Pair | None,
        padding: int | Pair,
        dilation: int | Pair,
        flags: tuple[bool, bool, bool],
    ) -> int:
        average, ceil_mode, count_include_pad = flags
        method = "BranchPlan.avg_pool2d" if average else "BranchPlan.max_pool2d"
        channels = self._map(source, method.partition(".")[2])
        size = pair(method, "kernel", kernel, 1)
        sides = pair(method, "padding", padding, 0)
        if any(2 * p > k for p, k in zip(sides, size, strict=True)):
            raise ValueError(
                f"{method}: padding must be at most half of the kernel {size}, got {sides}"
            )
        options = {
            "average": int(average),
            "kernel": size,
            "stride": size if stride is None else pair(method, "stride", stride, 1),
            "padding": sides,
            "dilation": pair(method, "dilation", dilation, 1),
            "ceil_mode": int(ceil_mode),
            "count_include_pad": int(count_include_pad),
        }
        return self._append("pool2d", (source,), (), options, channels)

    def _bias(self, bias: Tensor | None, out: int) -> Tensor | None:
        return None if bias is None else self._parameter("bias", bias, (out,))

    def _parameter(self, name: str, value: Tensor, sizes: tuple[int | None, ...]) -> Tensor:
        """A parameter [B, ...]; None in ``sizes`` stands for any size."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"BranchPlan: {name} must be a floating-point tensor, got {kind}")
        wanted = (self.branches, *sizes)
        if value.dim() != len(wanted) or any(
            w is not None and w != size for w, size in zip(wanted, value.shape, strict=True)
        ):
            words = ", ".join("any" if w is None else str(w) for w in wanted)
            raise ValueError(f"BranchPlan: {name} must be [{words}], got {list(value.shape)}")
        if value.is_inference():
            with torch.inference_mode(False), torch.no_grad():
                return value.clone()
        return value

    def _append(
        self,
        kind: str,
        sources: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        options: Mapping[str, object],
        channels: int | None,
        *,
        vector: bool = False,
    ) -> int:
        given = [t for t in tensors if t is not None]
        for t in given:
            other = (*self.parameters()[:1], *given)[0]
            if t.dtype != other.dtype or t.device != other.device:
                raise ValueError(
                    f"BranchPlan.{kind}: all parameters must share one dtype and device, got "
                    f"{other.dtype} on {other.device} and {t.dtype} on {t.device}"
                )
        self.steps.append(Step(kind, sources, tensors, options))
        self._slots.append((channels, vector))
        self.output = len(self.steps)
        self._changed()
        return self.output

    def _changed(self) -> None:
        self._lowered = self.native = None
        self._output_shapes.clear()
        self.calls.clear()
