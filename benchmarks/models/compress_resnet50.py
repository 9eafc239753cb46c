"""ResNet-50* with at least 27 % fewer parameters, as a mechanism: docs/results/compression.md.

    python benchmarks/models/compress_resnet50.py

ResNet-50* (:func:`pyeff.models.resnet50_decomposed`) has 21,784,616 parameters; the paper reports
27 % fewer without a loss of accuracy. There is no ImageNet here to train it on. What is shown is
that the two steps make it so much smaller for real and change nothing: the smallest channels are
set to zero by hand and removed, then layers are cut to a lower rank and factored. The network of
full size with the same zeros and the same ranks puts out the same. Weights are random.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compression_by_hand import compressed_to, settle_norms, truncate
from compression_inference import FORMS, markdown_times, time_networks
from timing import machine, markdown_table

import pyeff
from pyeff.checkpoint import write_bytes_atomically
from pyeff.compress import shrink, zero_smallest
from pyeff.measure import measure_cost
from pyeff.models import resnet50_decomposed

NAME = "compress_resnet50"
PARAMETERS = 21_784_616
ROUNDING = 1e-4


def sizes(model: nn.Module, side: int) -> dict[str, int]:
    """Parameters, multiply-adds of one image, and the bytes of the file, after a round trip.

    Raises:
        SystemExit: what comes back from the file computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pyeff.save(model, path)
        again = pyeff.load(path)
        x = torch.randn(1, 3, 64, 64)
        # Its weights may lie in another order, for which other kernels add in another order.
        difference = apart(again, model, x)
        if difference > ROUNDING:
            raise SystemExit(f"{NAME}: a saved network must come back, got {difference:.1e} apart")
        stored = path.stat().st_size
    cost = measure_cost(copy.deepcopy(model).to("meta").eval(), (3, side, side))
    return {"params": cost.params, "macs": cost.macs, "file_bytes": stored}


@torch.no_grad()
def apart(found: nn.Module, wanted: nn.Module, x: Tensor) -> float:
    """Largest difference of two networks' outputs, over the largest output."""
    one, other = found.eval()(x), wanted.eval()(x)
    return float((one - other).abs().max() / other.abs().max())


def made_smaller(model: nn.Module, x: Tensor, share: float) -> dict[str, Any]:
    """Both steps, each held against the network of full size in double precision.

    Args:
        model: of full size; its smallest channels are zeroed.
        x: images to compare outputs on.
        share: of the parameters that shall be left.

    Returns:
        ``networks`` by name, and the ``document`` of what was done.
    """
    example = x[:1]
    groups = zero_smallest(model, example, target_params=share**0.5, include_norm=True)
    removed = shrink(model, example)
    made = compressed_to(model, example, share)
    if made.factors is None or made.removal is None:
        raise SystemExit(f"{NAME}: both steps must have been taken, got one")
    cut = copy.deepcopy(removed)
    layers = truncate(cut, made.factors)
    wide = [copy.deepcopy(m).double() for m in (model, removed, cut, made.model)]
    full, without, lower, factored = wide
    document = {
        "channels": groups,
        "factored_layers": layers,
        "energy": made.energy,
        "removal_difference": {
            "float32": apart(removed, model, x),
            "float64": apart(without, full, x.double()),
        },
        "factors_difference": {
            "float32": apart(made.model, cut, x),
            "float64": apart(factored, lower, x.double()),
        },
    }
    networks = {"removed": removed, "removed, factored": made.model}
    return {"networks": networks, "document": document}


def print_tables(document: dict[str, Any]) -> None:
    """Markdown for the results page."""
    before = document["sizes"]["ResNet-50*"]
    rows = [
        [
            name,
            f"{size['params']:,}",
            f"{1 - size['params'] / before['params']:.1%}",
            f"{size['macs'] / 1e9:.3f} G",
            f"{size['file_bytes'] / 2**20:.1f} MiB",
        ]
        for name, size in document["sizes"].items()
    ]
    print(markdown_table(["network", "parameters", "fewer", "MACs", "file"], rows))
    for name in ("removal_difference", "factors_difference"):
        found = document[name]
        print(f"{name}: {found['float32']:.1e} (float32), {found['float64']:.1e} (float64)")
    if document["inference"]:
        print("\n" + markdown_times(document["inference"]))


def main() -> None:
    """Makes it smaller, compares, measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--share", type=float, default=0.70, help="of the parameters to be left")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timing, for a batch")
    parser.add_argument("--no-time", action="store_true", help="compare only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = resnet50_decomposed()
    if sum(p.numel() for p in model.parameters()) != PARAMETERS:
        raise SystemExit(f"{NAME}: ResNet-50* must have {PARAMETERS:,} parameters")
    settle_norms(model, arguments.seed)
    whole = copy.deepcopy(model)
    x = torch.randn(max(2, *arguments.batches), 3, arguments.size, arguments.size)
    made = made_smaller(model, x[:2], arguments.share)
    networks = {"ResNet-50*": whole, **made["networks"]}
    document: dict[str, Any] = {
        "machine": machine(),
        "share": arguments.share,
        "sizes": {name: sizes(network, arguments.size) for name, network in networks.items()},
        **made["document"],
        "inference": [],
    }
    if not arguments.no_time:
        document["inference"] = time_networks(
            networks,
            x,
            arguments.batches,
            arguments.threads,
            forms=arguments.forms,
            max_seconds=arguments.max_seconds,
        )
    text = json.dumps(document, indent=1) + "\n"
    write_bytes_atomically(arguments.out / f"{NAME}.json", text.encode())
    print_tables(document)


if __name__ == "__main__":
    main()
