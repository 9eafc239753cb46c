"""HydraNets of residual networks: Hydra-Res for images of CIFAR's size, and one of ResNet-50."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyeff.models.hydranet import HydraNet, class_groups_of
from pyeff.models.hydranet_parts import Stages, assemble, check_sizes, scaled
from pyeff.models.resnet import PlainStem, StemPlan


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
    stage = Stages("basic", preactivation, shortcut)
    plan = StemPlan(in_channels, first, 3, 1, norm=not preactivation, pool=False)
    stem = nn.Sequential(PlainStem(plan), *stage(first, first, 1, d), *stage(first, second, 2, d))
    template = nn.Sequential(*stage(second, branch, 2, d), *stage.end(branch))
    gate_body = nn.Sequential(*stage(second, body, 2, gate_depth), *stage.end(body))
    return assemble((stem, gate_body, template), (body, branch), config)


def hydranet_resnet50(
    classes: int = 1000,
    *,
    n_b: int = 50,
    k: int = 4,
    w_s: float = 0.5,
    w_b: float = 0.125,
    w_g: float = 0.125,
    d: int = 3,
    gate: str = "supervised",
    class_groups: Sequence[int] | None = None,
    gate_depth: int = 1,
    in_channels: int = 3,
    depths: Sequence[int] = (3, 4, 6),
    input_size: int = 224,
) -> HydraNet:
    """A HydraNet of ResNet-50: its last stage is there n_b times, narrower.

    Stem: 7x7 convolution, pooling and stages 1 to 3 of ResNet-50. The paper has no such network:
    widths and depths are ours.

    Args:
        classes, n_b, k, gate, class_groups, gate_depth, in_channels, input_size: as in
            :func:`hydranet_resnet`.
        w_s, w_b, w_g: width of stem (64 to 1024 channels), branches and gate (2048).
        d: bottleneck blocks of a branch.
        depths: bottleneck blocks of stages 1 to 3.

    Raises:
        ValueError: as in :func:`hydranet_resnet`.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, for the form; He et al., "Deep Residual
    Learning for Image Recognition", CVPR 2016, for the blocks.
    """
    config: dict[str, Any] = {
        "family": "hydranet_resnet50",
        "classes": classes,
        "n_b": n_b,
        "k": k,
        "w_s": w_s,
        "w_b": w_b,
        "w_g": w_g,
        "d": d,
        "gate": gate,
        "class_groups": class_groups_of(classes, n_b, class_groups),
        "gate_depth": gate_depth,
        "in_channels": in_channels,
        "depths": list(depths),
        "input_size": input_size,
    }
    check_sizes("hydranet_resnet50", classes=classes, n_b=n_b, d=d, gate_depth=gate_depth)
    check_sizes("hydranet_resnet50", w_s=w_s, w_b=w_b, w_g=w_g, in_channels=in_channels)
    if len(depths) != 3 or min(depths) < 1:
        raise ValueError(f"hydranet_resnet50: depths must be 3 positive ints, got {list(depths)}")
    first = scaled(64, w_s)
    sizes = [scaled(width, w_s, 4) for width in (256, 512, 1024)]
    branch, body = scaled(2048, w_b, 4), scaled(2048, w_g, 4)
    stage = Stages("bottleneck", False, "projection")
    stem = nn.Sequential(
        PlainStem(StemPlan(in_channels, first, 7, 2, norm=True, pool=True)),
        *stage(first, sizes[0], 1, depths[0]),
        *stage(sizes[0], sizes[1], 2, depths[1]),
        *stage(sizes[1], sizes[2], 2, depths[2]),
    )
    template = nn.Sequential(*stage(sizes[2], branch, 2, d), *stage.end(branch))
    gate_body = nn.Sequential(*stage(sizes[2], body, 2, gate_depth), *stage.end(body))
    return assemble((stem, gate_body, template), (body, branch), config)
