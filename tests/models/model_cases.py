"""What the tests of nested models share."""

import torch
from torch import nn

from pyeff.nn import NestedBatchNorm2d


def randomise_norms(model):
    """Gives every norm statistics and an affine part that a mistake would show in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | NestedBatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


def images(n=3, size=8, channels=3):
    return torch.randn(n, channels, size, size, dtype=torch.float64)
