"""HydraNets of residual networks: Hydra-Res on CIFAR's image size, and one of ResNet-50."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyeff.models.hydranet import HydraGate, HydraNet, class_groups_of
from pyeff.models.resnet import BlockPlan, PlainBlock, PlainStem, StemPlan, initialise
from pyeff.nn import Branches, Combiner, TopKGate


def hydranet_resnet(
    classes: int = 100,
    *,
    n_b: int = 20,
    k: int = 4,
    w_s: float = 1.0,
    w_b: float = 1.0,
    w_g: float = 0.5,
    d: int = 1,
    gate: str = "supervised",
    class_groups: Sequence[int] | None = None,
    gate_depth: int = 1,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    preactivation: bool = False,
    shortcut: str = "pad",
    input_size: int = 32,
) -> HydraNet:
    """Hydra-Res: a CIFAR residual network whose last stage is there n_b times.

    The stem is the first convolution and stages 1 and 2; branches and gate are stage 3 (the gate's
    of its own depth and width), each ending in the mean over the positions.

    Args:
        classes: number of classes.
        n_b: number of branches.
        k: how many run for an image.
        w_s, w_b, w_g: width of stem, branches and gate, as factors of ``widths``.
        d: residual blocks of each stage in stem and branches.
        gate: ``"supervised"``, ``"noisy_topk"`` or ``"learn"``; see :class:`~pyeff.nn.TopKGate`.
        class_groups: for every class, its branch; balanced and in order by default.
        gate_depth: residual blocks of the gate.
        in_channels: channels of the images.
        widths: channels of the three stages at width 1.
        preactivation: norm and ReLU before each convolution, not after. A branch then begins with
            a norm of its own on the stem's output, which costs memory traffic k times.
        shortcut: where the shape changes: ``"pad"`` (no weights) or ``"projection"``.
        input_size: pixels, for ``costs()``.

    Raises:
        ValueError: sizes that are not positive, an unknown gate or shortcut, k out of range, class
            groups that are not one branch for each class.

    Source: Mullapudi et al., "HydraNets", CVPR 2018. Of the text of its sections 3 to 5 little
    could be read; with n_b 20, k 12 and w_g 0.5 this network has the costs that the paper plots
    (52.4 million multiply-adds at d = 1, 580.9 at d = 9) and the 1.28 million parameters of d = 1.

    Example:
        >>> model = hydranet_resnet(100, n_b=20, k=12)
        >>> cost = model.costs()
        >>> round(cost.macs / 1e6, 1), round(cost.params / 1e6, 2)
        (52.4, 1.28)
    """
    groups = class_groups_of(classes, n_b, class_groups)
    config: dict[str, Any] = {
        "family": "hydranet_resnet",
        "classes": classes,
        "n_b": n_b,
        "k": k,
        "w_s": w_s,
        "w_b": w_b,
        "w_g": w_g,
        "d": d,
        "gate": gate,
        "class_groups": groups,
        "gate_depth": gate_depth,
        "in_channels": in_channels,
        "widths": list(widths),
        "preactivation": preactivation,
        "shortcut": shortcut,
        "input_size": input_size,
    }
    check_sizes("hydranet_resnet", classes=classes, n_b=n_b, d=d, gate_depth=gate_depth)
    check_sizes("hydranet_resnet", w_s=w_s, w_b=w_b, w_g=w_g, in_channels=in_channels)
    if len(widths) != 3 or min(widths) < 1:
        raise ValueError(f"hydranet_resnet: widths must be 3 positive ints, got {list(widths)}")
    if shortcut not in ("pad", "projection"):
        raise ValueError(
            f"hydranet_resnet: shortcut must be 'pad' or 'projection', got {shortcut!r}"
        )
    first, second = scaled(widths[0], w_s), scaled(widths[1], w_s)
    branch, body = scaled(widths[2], w_b), scaled(widths[2], w_g)
    stage = _Stages("basic", preactivation, shortcut)
    plan = StemPlan(in_channels, first, 3, 1, norm=not preactivation, pool=False)
    stem = nn.Sequential(PlainStem(plan), *stage(first, first, 1, d), *stage(first, second, 2, d))
    template = nn.Sequential(*stage(second, branch, 2, d), *stage.end(branch))
    gate_body = nn.Sequential(*stage(second, body, 2, gate_depth), *stage.end(body))
    return assemble(
        (stem, gate_body, template),
        (body, branch),
        config,
        gate=gate,
        n_b=n_b,
    )


class _Stages:
    """Makes stages of residual blocks of one kind."""

    def __init__(self, block: str, preactivation: bool, shortcut: str) -> None:
        self.block, self.preactivation, self.shortcut = block, preactivation, shortcut

    def __call__(self, inputs: int, outputs: int, stride: int, depth: int) -> list[nn.Module]:
        """The blocks of a stage; the first one changes the shape."""
        blocks: list[nn.Module] = []
        for i in range(depth):
            stride = stride if i == 0 else 1
            kind = "identity" if stride == 1 and inputs == outputs else self.shortcut
            inner = outputs if self.block == "basic" else outputs // 4
            ratio = max(1, outputs // inputs)
            pad = (ratio, 0, outputs - ratio * inputs)
            plan = BlockPlan(inputs, inner, outputs, stride, 1, kind, pad)
            blocks.append(PlainBlock(plan, self.block, self.preactivation))
            inputs = outputs
        return blocks

    def end(self, channels: int) -> list[nn.Module]:
        """What follows the last block: to features ``[N, channels]``."""
        norm = [nn.BatchNorm2d(channels), nn.ReLU()] if self.preactivation else []
        return [*norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def assemble(
    parts: tuple[nn.Module, nn.Module, nn.Module],
    features: tuple[int, int],
    config: dict[str, Any],
    *,
    gate: str,
    n_b: int,
) -> HydraNet:
    """A HydraNet of its plain parts.

    Args:
        parts: stem, gate body and one branch.
        features: what gate body and branch emit.
        config: the model's; classes, k, class groups, channels and image size are read from it.
        gate: the gate's mode.
        n_b: number of branches.
    """
    stem, body, template = parts
    initialise(stem)
    initialise(body)
    return HydraNet(
        stem,
        HydraGate(body, TopKGate(features[0], n_b, gate)),
        Branches(template, n_b, init=initialise),
        Combiner(features[1], config["classes"], n_b),
        class_group=config["class_groups"],
        k=config["k"],
        in_channels=config["in_channels"],
        input_size=config["input_size"],
        config=config,
    )


def scaled(channels: int, width: float) -> int:
    """Channels at a width factor, at least one."""
    return max(1, round(channels * width))


def check_sizes(model: str, **sizes: float) -> None:
    """Every one of ``sizes`` is positive.

    Raises:
        ValueError: one is not.
    """
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{model}: {name} must be positive, got {value}")
