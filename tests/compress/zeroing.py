"""Networks with channels that were made dead by hand, and what must hold of them."""

import torch
from torch import nn

from pyeff.compress import channel_groups


@torch.no_grad()
def randomise_norms(model):
    """Gives every batch norm statistics and parameters that are not those of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)


@torch.no_grad()
def kill(model, example, share=0.4, include_norm=True):
    """Sets a share of the channels of every group to zero; how many that are, for each layer."""
    lost = {}
    for group in channel_groups(model, example, include_norm=include_norm):
        number = min(round(share * group.channels), group.channels - 1)
        dead = torch.zeros(group.channels, dtype=torch.bool)
        dead[torch.randperm(group.channels)[:number]] = True
        group.clear(model, dead)
        for member in group.members:
            if member.role == "producer":
                lost[member.name] = lost.get(member.name, 0) + number * member.index.shape[1]
    return lost


def outputs(layer):
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def assert_lost(model, small, report, lost):
    """Every layer has lost exactly what was zeroed, and says so."""
    for name, number in lost.items():
        before, after = outputs(model.get_submodule(name)), outputs(small.get_submodule(name))
        assert after == before - number, name
        assert report.channels[name] == (before, after)
    assert report.kept == {}
    assert sum(lost.values()) > 0
    assert report.parameters == (parameters(model), parameters(small))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def flat(output):
    """The tensors of a network's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output for t in flat(part)]


def assert_trains(model, x):
    """Every parameter gets a finite gradient."""
    sum(out.square().mean() for out in flat(model.eval()(x))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    model.zero_grad()


@torch.no_grad()
def assert_exports(model, x):
    """An exported program gives the same."""
    wanted = model.eval()(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-5)
