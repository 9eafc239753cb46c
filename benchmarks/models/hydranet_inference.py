"""Time of a HydraNet's inference beside static networks, each in the fastest form that it has.

Part of hydranet_cifar100.py. All forms of all networks run in every round, on real test images, so
that branches are chosen as they would be; what counts is the ratio within a round. A static
network's forms: torch layers with batch norms folded into convolutions, the same frozen by
TorchScript for inference (weights packed for oneDNN), and compiled by inductor with frozen, packed
weights. A HydraNet's: stem and gate folded and the branches as one stage each, the same with stem
and gate frozen by TorchScript, and with stem and gate compiled and frozen.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import Candidate, Comparison, compare, markdown_table, prefer_this_process
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx.experimental.optimization import fuse

import pyeff
from pyeff.models.hydranet import HydraNet
from pyeff.train import TaskData
from pyeff.train.batches import normalise
from pyeff.train.network import lay_out

BATCHES = (1, 32, 128)
Run = Callable[[Tensor], Tensor]


def folded(model: nn.Module) -> nn.Module:
    """Batch norms folded into the convolutions before them, channels_last."""
    fused = fuse(copy.deepcopy(model).eval())
    return fused.to(memory_format=torch.channels_last)


def scripted(model: nn.Module, x: Tensor) -> Run:
    """Traced, frozen, and its weights packed."""
    traced = torch.jit.trace(folded(model), x, check_trace=False)
    run: Run = torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
    for _ in range(3):
        run(x)
    return run


def compiled(model: nn.Module, x: Tensor) -> Run:
    """Compiled for this shape, its weights constants that inductor packs."""
    torch._dynamo.reset()
    run: Run = torch.compile(folded(model), dynamic=False)
    with inductor.patch(freezing=True):
        for _ in range(2):
            run(x)
    return run


def static_forms(model: nn.Module, x: Tensor) -> dict[str, Run]:
    """Every form of a static network, warmed up for ``x``."""
    return {
        "folded": folded(model),
        "scripted": scripted(model, x),
        "compiled": compiled(model, x),
    }


def hydranet_forms(model: HydraNet, x: Tensor) -> dict[str, Run]:
    """Every form of a HydraNet, warmed up for ``x``."""
    with torch.inference_mode():
        maps = model.stem(x)
    forms: dict[str, Run] = {}
    for name, make in (
        ("folded", lambda part, _: folded(part)),
        ("scripted", scripted),
        ("compiled", compiled),
    ):
        stem, body = make(model.stem, x), make(model.gate.body, maps)
        forms[name] = _assembled(model, stem, body)
    return forms


def _assembled(model: HydraNet, stem: Run, body: Run) -> Run:
    """The network with other forms of its stem and gate."""

    def run(x: Tensor) -> Tensor:
        maps = stem(x)
        routes = model.gate.top_k(body(maps), model.k).routes
        return model.combiner(model.branches(maps, routes), routes)

    return run


def time_inference(
    folders: Mapping[str, Path], task: TaskData, threads: int, *, max_seconds: float = 60.0
) -> list[dict[str, Any]]:
    """Times every network at every batch.

    Args:
        folders: of finished runs, by name; one of them of a HydraNet.
        task: whose test images run.
        threads: of torch.
        max_seconds: for each batch.

    Returns:
        One row a batch and network: milliseconds an image of its fastest form, and of all.
    """
    prefer_this_process()
    torch.set_num_threads(threads)
    models = {name: pyeff.load(folder).eval() for name, folder in folders.items()}
    for model in models.values():
        # Not in inference mode: weights made there are never packed ahead.
        lay_out(model, torch.channels_last)
    rows = []
    for images in BATCHES:
        x = normalise(task.test_images[:images], task.mean, task.std)
        x = x.contiguous(memory_format=torch.channels_last)
        candidates: dict[str, Candidate] = {}
        with torch.inference_mode():
            for name, model in models.items():
                candidates |= _candidates(name, model, x)
            found = compare(candidates, max_seconds=max_seconds)
        rows += [_row(found, name, list(models), images) for name in models]
    return rows


def _candidates(name: str, model: nn.Module, x: Tensor) -> dict[str, Candidate]:
    """Calls of every form, each held against the model's own output first."""
    expected = model(x)
    forms = hydranet_forms(model, x) if isinstance(model, HydraNet) else static_forms(model, x)
    calls: dict[str, Candidate] = {}
    for form, run in forms.items():
        torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-3)

        def call(run: Run = run) -> object:
            return run(x)

        calls[f"{name}: {form}"] = call
    return calls


def _row(found: Comparison, name: str, names: list[str], images: int) -> dict[str, Any]:
    def fastest(other: str) -> str:
        return found.strongest([key for key in found.seconds if key.startswith(f"{other}: ")])

    mine = fastest(name)
    forms = {k.split(": ")[1]: found.time(k).median for k in found.seconds if k.startswith(name)}
    return {
        "network": name,
        "images": images,
        "form": mine.split(": ")[1],
        "ms_per_image": 1e3 * found.time(mine).median / images,
        "forms_ms_per_image": {form: 1e3 * s / images for form, s in forms.items()},
        # How many times faster this network is than each of the others.
        "speedup_over": {
            other: vars(found.speedup(mine, fastest(other))) for other in names if other != name
        },
        "clean": found.clean,
    }


def markdown_times(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: a line a network, milliseconds an image at each batch."""
    batches = sorted({row["images"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = {row["images"]: row for row in rows if row["network"] == name}
        cells = [f"{mine[b]['ms_per_image']:.3f} ({mine[b]['form']})" for b in batches]
        lines.append([name, *cells])
    return markdown_table(["ms an image", *(f"batch {b}" for b in batches)], lines)
