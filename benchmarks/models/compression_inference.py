"""Time of compressed networks beside those that they came from, in the forms that both have.

Part of the compression scripts. All forms of all networks run in every round; what counts is the
ratio within a round. The forms: as it is (``eager``), traced and frozen by TorchScript with norms
folded and weights packed (``scripted``), and compiled by inductor with frozen weights
(``compiled``).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from erfnet_forms import Run, compiled
from timing import Candidate, Comparison, compare, markdown_table, prefer_this_process
from torch import Tensor, nn

from pyeff.train.network import lay_out

FORMS = ("eager", "scripted", "compiled")
# Of the outputs of a form, relative to the largest one of the network as it is.
TOLERANCE = 1e-3


def scripted(model: nn.Module, x: Tensor) -> Run:
    """Traced, frozen, and its weights packed."""
    with warnings.catch_warnings():
        # Checks of shapes become constants, which is right for one shape.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    run: Run = torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
    for _ in range(3):
        run(x)
    return run


_MAKE: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": lambda model, x: model,
    "scripted": scripted,
    "compiled": compiled,
}


def time_networks(
    models: Mapping[str, nn.Module],
    images: Tensor,
    batches: Sequence[int],
    threads: int,
    *,
    forms: Sequence[str] = FORMS,
    max_seconds: float = 60.0,
) -> list[dict[str, Any]]:
    """Times every network at every batch, in float32.

    Args:
        models: by name; the first is what the others are compared with. Set to eval mode and
            channels_last.
        images: as the networks take them, as many as the largest batch.
        batches: numbers of images.
        threads: of torch.
        forms: of every network.
        max_seconds: for each batch.

    Returns:
        One row a batch and network: milliseconds an image of its fastest form, and of all.

    Raises:
        AssertionError: a form computes something else.
    """
    prefer_this_process()
    torch.set_num_threads(threads)
    for model in models.values():
        # Not in inference mode: weights made there are never packed ahead.
        lay_out(model.eval(), torch.channels_last)
    rows = []
    for number in batches:
        torch._dynamo.reset()
        x = images[:number].contiguous(memory_format=torch.channels_last)
        candidates: dict[str, Candidate] = {}
        for name, model in models.items():
            candidates |= _candidates(name, model, x, forms)
        with torch.inference_mode():
            found = compare(candidates, max_seconds=max_seconds)
        rows += [_row(found, name, list(models), number, threads) for name in models]
    return rows


def _candidates(
    name: str, model: nn.Module, x: Tensor, forms: Sequence[str]
) -> dict[str, Candidate]:
    """Calls of every form, each held against the network's own output first."""
    calls: dict[str, Candidate] = {}
    with torch.inference_mode():
        expected = model(x)
    for form in forms:
        with torch.no_grad():
            run = _MAKE[form](model, x)
        with torch.inference_mode():
            bound = TOLERANCE * float(expected.abs().max())
            torch.testing.assert_close(run(x), expected, rtol=0, atol=bound)

        def call(run: Run = run) -> object:
            return run(x)

        calls[f"{name}: {form}"] = call
    return calls


def _row(
    found: Comparison, name: str, names: list[str], images: int, threads: int
) -> dict[str, Any]:
    def keys(other: str) -> list[str]:
        return [key for key in found.seconds if key.startswith(f"{other}: ")]

    mine, first = found.strongest(keys(name)), found.strongest(keys(names[0]))
    forms = {key.split(": ")[1]: 1e3 * found.time(key).median / images for key in keys(name)}
    return {
        "network": name,
        "images": images,
        "threads": threads,
        "form": mine.split(": ")[1],
        "ms_per_image": 1e3 * found.time(mine).median / images,
        "forms_ms_per_image": forms,
        # How many times faster it is than the first network, each in its fastest form.
        "speedup": vars(found.speedup(mine, first)),
        "clean": found.clean,
    }


def time_steps(
    models: Mapping[str, nn.Module], images: Tensor, labels: Tensor, *, precision: str
) -> dict[str, float]:
    """Seconds of a training step of every network, measured in turn.

    Args:
        models: by name; left in training mode, with other weights.
        images: a batch as the networks take it.
        labels: its classes.
        precision: ``"bf16"`` for autocast.
    """

    def step_of(model: nn.Module) -> Candidate:
        lay_out(model.train(), torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

        def step() -> object:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return optimizer.step()

        return step

    found = compare({name: step_of(model) for name, model in models.items()}, rounds=9)
    return {name: found.time(name).median for name in models}


def markdown_times(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table: a line a network and batch."""
    lines = []
    for row in rows:
        forms = [
            f"{row['forms_ms_per_image'][form]:.3f}" if form in row["forms_ms_per_image"] else ""
            for form in FORMS
        ]
        ratio = row["speedup"]
        words = f"{ratio['median']:.2f} [{ratio['p10']:.2f}..{ratio['p90']:.2f}]"
        lines.append([row["network"], row["images"], *forms, words, "" if row["clean"] else "yes"])
    columns = ["ms an image", "batch", *FORMS, "times faster than the first", "disturbed"]
    return markdown_table(columns, lines)
