"""The largest memory of a training step through pairs, counted by allocations."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pyeff.ops import factorized_conv2d

CHANNELS, HEIGHT, WIDTH = 8, 24, 40
MAP_BYTES = CHANNELS * HEIGHT * WIDTH * 4


def ours(x, w_first, w_second, bias):
    return factorized_conv2d(x, w_first, bias, w_second, bias, outer="relu")


def composition(x, w_first, w_second, bias):
    middle = F.conv2d(x, w_first, bias, padding=(1, 0)).relu()
    return F.conv2d(middle, w_second, bias, padding=(0, 1)).relu()


def peak_maps(pair, pairs, dtype=torch.float32):
    """The most that a step has allocated at once, in maps of float32."""
    x = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (CHANNELS, CHANNELS)
    weights = [(0.1 * torch.randn(*shape, *k)).to(dtype).requires_grad_() for k in ((3, 1), (1, 3))]
    bias = torch.zeros(CHANNELS, dtype=dtype, requires_grad=True)

    def step():
        y = x
        for _ in range(pairs):
            y = pair(y, *weights, bias)
        torch.autograd.grad(y.sum(), [*weights, bias])

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / MAP_BYTES


def test_a_longer_chain_keeps_one_map_more_a_pair():
    """Its result, which the next one keeps as its input; torch keeps the map between as well."""
    growth = {pair: peak_maps(pair, 10) - peak_maps(pair, 4) for pair in (ours, composition)}
    assert growth[ours] == pytest.approx(6, abs=0.1)
    assert growth[composition] == pytest.approx(12, abs=0.1)


def test_a_step_takes_less_than_that_of_two_convolutions():
    assert peak_maps(ours, 8) < 0.75 * peak_maps(composition, 8)
