"""A run that two processes share; test_sparsity_distributed.py starts them, or runs it alone."""

import importlib
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compress.sparsity_training import EXAMPLE, SmallNet, make_optimizer, problem

from pyeff.compress import GroupSparsity, LowRank


def run(rank=0, processes=1, wrap=lambda net: net):
    """Weights and statistics after three steps on this process's share of the images."""
    net = SmallNet().double()
    wrapped = wrap(net)
    optimizer = make_optimizer("momentum", net)
    penalties = [
        LowRank(net, strength=1.0),
        GroupSparsity(net, EXAMPLE.double(), target_params=0.5, schedule=[0.1] * 3, mask=True),
    ]
    for penalty in penalties:
        penalty.attach(optimizer)
    x, y = problem(32)
    net.norm2.eval()  # batch statistics would be those of a share
    for _ in range(3):
        optimizer.zero_grad()
        mine = slice(rank, None, processes)
        F.cross_entropy(wrapped(x.double()[mine]), y[mine]).backward()
        optimizer.step()
        for penalty in penalties:
            penalty.after_step(0.1)
        for penalty in penalties:
            penalty.end_epoch(0.1)
    return net.state_dict(), [penalty.statistics() for penalty in penalties]


def main(rank, processes, meeting, out):
    torch.set_num_threads(1)
    # Before there is a group, which it would keep: see pyeff.train.processes.joined.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
    )
    weights, statistics = run(rank, processes, torch.nn.parallel.DistributedDataParallel)
    torch.save(weights, f"{out}.{rank}.pt")
    with open(f"{out}.{rank}.json", "w") as file:
        json.dump(statistics, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
