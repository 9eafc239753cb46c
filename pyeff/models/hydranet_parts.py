"""What the HydraNets are put together of."""

from typing import Any

from torch import nn

from pyeff.models.hydranet import HydraGate, HydraNet
from pyeff.models.resnet import BlockPlan, PlainBlock, initialise
from pyeff.nn import Branches, Combiner, TopKGate


class Stages:
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
) -> HydraNet:
    """A HydraNet of its plain parts.

    Args:
        parts: stem, gate body and one branch.
        features: what gate body and branch emit.
        config: the model's; classes, n_b, k, gate, class groups, channels and image size are read
            from it.
    """
    stem, body, template = parts
    n_b = config["n_b"]
    initialise(stem)
    initialise(body)
    return HydraNet(
        stem,
        HydraGate(body, TopKGate(features[0], n_b, config["gate"])),
        Branches(template, n_b, init=initialise),
        Combiner(features[1], config["classes"], n_b),
        class_group=config["class_groups"],
        k=config["k"],
        in_channels=config["in_channels"],
        input_size=config["input_size"],
        config=config,
    )


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """Channels at a width factor: the nearest multiple that is not zero."""
    return multiple * max(1, round(channels * width / multiple))


def check_sizes(model: str, **sizes: float) -> None:
    """Every one of ``sizes`` is positive.

    Raises:
        ValueError: one is not.
    """
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{model}: {name} must be positive, got {value}")
