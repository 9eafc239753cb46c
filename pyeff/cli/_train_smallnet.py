"""`pyeff train smallnet`: what it has beside the options of every run of one task."""

from collections.abc import Sequence

from pyeff.cli._options import Option

# The recipe of the ExpandNets paper.
_RECIPE = {
    "epochs": 150,
    "lr": 0.01,
    "weight-decay": 0.0,
    "schedule": "thirds",
    "nesterov": False,
}

SMALLNET: list[Option] = [
    ("kernel", int, 7, "Side of the convolutions' kernels: 3 or 7."),
    (
        "expand",
        str,
        "none",
        "Layers that are chains in training: cl, ck (kernel 7), fc, cl+fc, ck+fc, or none.",
    ),
    ("rate", float, 4.0, "Widths of the chains over those of the plain layers."),
    (
        "activation",
        str,
        "none",
        "relu: between a chain's members; the network to start a linear one from (+Init).",
    ),
    ("form", str, "auto", "How chains run in training: expanded, contracted or auto."),
    (
        "weight-decay-on",
        str,
        "factors",
        "factors: the members' weights; product: the weight that a chain contracts to.",
    ),
    (
        "init-from",
        str | None,
        None,
        "Folder or file of a run whose weights this one starts from, such as one with "
        "--activation relu.",
    ),
]
# Those that are arguments of pyeff.models.smallnet.
SMALLNET_NAMES = {name: name for name in ("kernel", "expand", "rate", "activation", "form")}
DOC = (
    "Train SmallNet: as it is, or expanded, with layers that are chains of linear ones and are "
    "contracted afterwards.\n\n"
    "The defaults are the recipe of ExpandNets. results.json has the accuracy of the last epoch "
    "and of the best one; the network that is kept is the last epoch's.\n\n"
    "Example: pyeff train smallnet --data data --task cifar100:fine --kernel 7 --expand ck "
    "--rate 4 --out runs/ck\n\n"
    "Example: pyeff train smallnet --data data --task cifar100:fine --expand ck --activation relu "
    "--out runs/relu, then pyeff train smallnet --data data --task cifar100:fine --expand ck "
    "--init-from runs/relu --out runs/ck_init"
)


def with_recipe(options: Sequence[Option]) -> list[Option]:
    """Options with the paper's recipe as their defaults."""
    return [(name, kind, _RECIPE.get(name, default), text) for name, kind, default, text in options]
