"""Time of DecomposeMe's inference beside its dense form, each as it is and in plain torch.

Part of decomposeme_cifar100.py. All forms of all networks run in every round, on the same test
images; what counts is the ratio within a round. A network's forms: as pyeff runs it (norms folded,
a pair one call), as torch layers (norms folded, in-place ReLUs, channels_last, a pair two calls),
and those compiled by inductor with frozen, packed weights.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from erfnet_forms import Run, compiled
from timing import Candidate, Comparison, compare, markdown_table, prefer_this_process
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import pyeff
from pyeff.models import DecomposeMe
from pyeff.nn import ConvNorm2d, FactorizedConv2d
from pyeff.train import TaskData
from pyeff.train.batches import normalise
from pyeff.train.network import lay_out

BATCHES = (1, 32)
FORMS = ("pyeff", "torch", "compiled")


def plain(model: DecomposeMe) -> nn.Module:
    """The network of torch layers alone, norms folded.

    Raises:
        ValueError: a network with skips, or with another activation than ReLU between two lines.
    """
    if len(model.skips):
        raise ValueError(f"plain: model must have no skips, got {len(model.skips)}")
    # The parts are laid out anew, which shall not reach the model that they come from.
    model = copy.deepcopy(model)
    parts: list[nn.Module] = []
    for number, layer in enumerate(model.layers, 1):
        parts += _lines(layer) if isinstance(layer, FactorizedConv2d) else _dense(layer)
        parts.append(nn.ReLU(inplace=True))
        if number in model.pools:
            parts.append(nn.MaxPool2d(2))
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head]
    layers = nn.Sequential(*parts).eval()
    lay_out(layers, torch.channels_last)
    return layers


def _lines(pair: FactorizedConv2d) -> list[nn.Module]:
    if pair.inner not in (None, "relu"):
        raise ValueError(f"plain: inner must be relu or None, got {pair.inner!r}")
    between: list[nn.Module] = [nn.ReLU(inplace=True)] if pair.inner else []
    return [
        _folded(pair.first, pair.norm_inner),
        *between,
        _folded(pair.second, pair.norm_outer),
    ]


def _dense(layer: nn.Module) -> list[nn.Module]:
    layer = cast(ConvNorm2d, layer)
    return [_folded(cast(nn.Conv2d, layer.conv), layer.norm)]


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> nn.Module:
    return conv if norm is None else fuse_conv_bn_eval(conv, norm)


def time_inference(
    folders: Mapping[str, Path], task: TaskData, threads: int, *, max_seconds: float = 60.0
) -> list[dict[str, Any]]:
    """Times every network at every batch, in float32.

    Args:
        folders: of finished runs, by name.
        task: whose test images run.
        threads: of torch.
        max_seconds: for each batch.

    Returns:
        One row a batch and network: milliseconds an image of its fastest form, and of all.
    """
    prefer_this_process()
    torch.set_num_threads(threads)
    models = {name: cast(DecomposeMe, pyeff.load(at).eval()) for name, at in folders.items()}
    for model in models.values():
        # Not in inference mode: weights made there are never packed ahead.
        lay_out(model, torch.channels_last)
    rows = []
    for images in BATCHES:
        torch._dynamo.reset()
        x = normalise(task.test_images[:images], task.mean, task.std)
        x = x.contiguous(memory_format=torch.channels_last)
        candidates: dict[str, Candidate] = {}
        for name, model in models.items():
            candidates |= _candidates(name, model, x)
        with torch.inference_mode():
            found = compare(candidates, max_seconds=max_seconds)
        rows += [_row(found, name, list(models), images, threads) for name in models]
    return rows


def _candidates(name: str, model: DecomposeMe, x: Tensor) -> dict[str, Candidate]:
    """Calls of every form, each held against the model's own output first."""
    layers = plain(model)
    calls: dict[str, Candidate] = {}
    with torch.inference_mode():
        runs: tuple[Run, ...] = (model, layers, compiled(layers, x))
        expected = model(x)
        for form, run in zip(FORMS, runs, strict=True):
            torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-3)

            def call(run: Run = run) -> object:
                return run(x)

            calls[f"{name}: {form}"] = call
    return calls


def _row(
    found: Comparison, name: str, names: list[str], images: int, threads: int
) -> dict[str, Any]:
    def fastest(other: str) -> str:
        return found.strongest([key for key in found.seconds if key.startswith(f"{other}: ")])

    mine = fastest(name)
    ours = found.time(mine).median
    keys = [key for key in found.seconds if key.startswith(f"{name}: ")]
    return {
        "network": name,
        "images": images,
        "threads": threads,
        "form": mine.split(": ")[1],
        "ms_per_image": 1e3 * ours / images,
        "forms_ms_per_image": {
            key.split(": ")[1]: 1e3 * found.time(key).median / images for key in keys
        },
        # How many times faster this network is than each of the others.
        "speedup_over": {
            other: vars(found.speedup(mine, fastest(other))) for other in names if other != name
        },
        "clean": found.clean,
    }


def markdown_times(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: a line a network and batch."""
    lines = []
    for row in rows:
        forms = [
            f"{row['forms_ms_per_image'][form]:.3f}" for form in ("pyeff", "torch", "compiled")
        ]
        over = row["speedup_over"].get("dense")
        ratio = f"{over['median']:.2f} [{over['p10']:.2f}..{over['p90']:.2f}]" if over else ""
        lines.append([row["network"], row["images"], *forms, ratio, "" if row["clean"] else "yes"])
    columns = ["ms an image", "batch", *FORMS, "dense over it", "disturbed"]
    return markdown_table(columns, lines)
