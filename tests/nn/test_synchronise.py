"""Batch norm over two gloo processes equals one process with the joint batch."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pyeff.nn import (
    BranchBatchNorm2d,
    NestedBatchNorm2d,
    SynchronisedBatchNorm2d,
    synchronise_batch_norm,
    synchronised_batch_norm,
)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nested = NestedBatchNorm2d(6, 2, 3, affine="private")
        self.plain = nn.BatchNorm2d(4)
        self.branches = BranchBatchNorm2d(4, 4)

    def forward(self, x):
        routes = x[:, :3, 0, 0].argsort(1)[:, :2]  # an image's own, whatever process it is on
        y = self.branches(self.plain(self.nested(x, 1, 2, (1, 5))), routes)
        return 2 * y[:, 0] - y[:, 1]


def _net():
    torch.manual_seed(3)
    net = _Net().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def _batch():
    torch.manual_seed(4)
    return torch.randn(6, 4, 3, 5, dtype=torch.float64) + 3, torch.randn(
        6, 4, 3, 5, dtype=torch.float64
    )


SPLITS = (2, 6)  # uneven; all images on one process and none on the other


def _worker(rank, folder):
    torch.set_num_threads(1)
    # Before there is a group, which it would keep: see pyeff.train.processes.joined.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = []
    for split in SPLITS:
        net = synchronise_batch_norm(_net())
        x, target = _batch()
        rows = slice(0, split) if rank == 0 else slice(split, 6)
        x = x[rows].clone().requires_grad_(True)
        out = net(x)
        (out * target[rows]).sum().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        for grad in grads:
            dist.all_reduce(grad)
        results.append((out.detach(), x.grad, grads, net.state_dict()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    net = _net()
    x, target = _batch()
    x.requires_grad_(True)
    out = net(x)
    (out * target).sum().backward()
    for first, second in zip(*ranks, strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), out.detach())
        torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad)
        for one in (first, second):
            for got, parameter in zip(one[2], net.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad)
            for name, value in net.state_dict().items():
                torch.testing.assert_close(one[3][name], value)


def test_alone_nothing_changes():
    x, _ = _batch()
    torch.testing.assert_close(synchronise_batch_norm(_net())(x), _net()(x))


def test_parameters_stay_the_same_tensors():
    net = _net()
    before = list(net.parameters())
    synchronise_batch_norm(net)
    assert isinstance(net.plain, SynchronisedBatchNorm2d)
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


def test_statistics_function_is_batch_norm_and_differentiable(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: None)
    x, _ = _batch()
    x = x[:2, :2, :2, :2].clone().requires_grad_(True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def run(x, weight):
        return synchronised_batch_norm(x, None, None, weight, None, 0.1, 1e-5, None)

    expected = nn.functional.batch_norm(x, mean, var, weight, None, True, 0.1, 1e-5)
    torch.testing.assert_close(run(x, weight), expected)
    assert torch.autograd.gradcheck(run, (x, weight))


def test_one_value_per_channel_is_an_error(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: None)
    with pytest.raises(ValueError, match="more than one value per channel"):
        synchronised_batch_norm(torch.randn(1, 3, 1, 1), None, None, None, None, 0.1, 1e-5, None)
