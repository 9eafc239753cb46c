"""`pyeff train dvn|backbone|decomposeme|...`: from a folder of images to a trained network."""

from collections.abc import Callable
from typing import Any

import typer

from pyeff.cli._options import Option, exits_of_training, is_given, make_command
from pyeff.cli._train_smallnet import DOC as SMALLNET_DOC
from pyeff.cli._train_smallnet import SMALLNET, SMALLNET_NAMES, with_recipe

train = typer.Typer(
    name="train",
    help="Train a nested network, a HydraNet, DecomposeMe, SmallNet, a backbone, or ERFNet.",
    no_args_is_help=True,
)

_RUN: list[Option] = [
    (
        "task",
        list[str],
        ["digits:class", "digits:parity"],
        "A task, once for each: cifar100:fine, cifar100:coarse, cifar10, chars74k, chars74k:grey, "
        "digits:class, digits:parity (bundled, no files), NAME=FOLDER (train/ and val/ or test/ "
        "with one folder a class).",
    ),
    (
        "data",
        str | None,
        None,
        "Folder that holds cifar-100-python, cifar-10-batches-py, chars74k, ...",
    ),
    ("out", str, "runs/train", "Folder for checkpoint, metrics, table and plots."),
    ("resume", bool, False, "Go on from the checkpoint in --out, with its settings."),
    ("overwrite", bool, False, "Start anew although --out holds a checkpoint."),
    ("epochs", int, 30, "Passes over the largest task."),
    ("batch-size", int, 128, "Images a task and step, over all processes."),
    ("lr", float, 0.1, "Learning rate (the peak of onecycle)."),
    ("momentum", float, 0.9, "Of SGD."),
    ("nesterov", bool, True, "Nesterov's momentum, rather than the plain one."),
    ("weight-decay", float, 5e-4, "On weights of convolutions and linear layers."),
    (
        "schedule",
        str,
        "onecycle",
        "multistep (50 % and 75 %), thirds, cosine, onecycle or constant.",
    ),
    ("warmup", float, 0.0, "Share of the steps in which the rate rises (onecycle: 0 is 0.25)."),
    ("clip", float, 0.0, "Largest gradient norm; 0 does not clip."),
    ("label-smoothing", float, 0.0, "Share of the target spread over all classes."),
    ("augment", bool, True, "Random crops, and mirroring where the class allows."),
    ("calibrate", int, 0, "Batches for batch norm statistics computed anew at the end; 0: none."),
    ("precision", str, "fp32", "fp32, bf16 (autocast) or fp64."),
    ("channels-last", bool, True, "Memory format of the weights."),
    ("compile", bool, False, "Run the network through torch.compile."),
    ("seed", int, 0, "Of weights, order, augmentation and random levels."),
    ("sync-batch-norm", bool, True, "Under torchrun: statistics over the joint batch."),
    ("limit-train", int | None, None, "At most this many training images of each task."),
    ("limit-test", int | None, None, "At most this many test images of each task."),
    ("image-size", int | None, None, "Pixels a side, for image folders of mixed sizes."),
    ("eval-every", int, 1, "Epochs between evaluations; the last one is always evaluated."),
    ("save-every", int, 1, "Epochs between checkpoints."),
    ("device", str, "auto", "auto, cpu or cuda."),
    ("backend", str | None, None, "Force one backend of the operators (torch, cpp, triton, ...)."),
    ("progress", bool, True, "A progress bar, on a terminal."),
]
_ONE_TASK: list[Option] = [("task", list[str], ["digits:class"], _RUN[0][3]), *_RUN[1:]]
_LEVELS: list[Option] = [
    ("levels", int, 4, "Number of levels."),
    (
        "level-rule",
        str,
        "sum",
        "sum: every level at every step; sandwich: largest, smallest, some.",
    ),
    ("sandwich-levels", int, 4, "Levels a step under the sandwich rule."),
    ("distill", bool, False, "Lower levels learn the soft output of the largest."),
    ("prune-until", float, 0.5, "Weight strategy: share of the steps in which masks are thinned."),
    ("task-rule", str, "joint", "joint: one optimiser step for all tasks; alternate: one each."),
]
_NETWORK: list[Option] = [
    ("backbone", str, "resnet20", "resnet8, resnet20, ..., wrn32_4, wrn28_10, resnet18, ..."),
    ("width", list[int] | None, None, "Channels of each stage, once for each, to replace its own."),
    ("depth", list[int] | None, None, "Blocks of each stage, once for each, to replace its own."),
]
# Options that are arguments of pyeff.models, by their name there.
_MODEL_NAMES = {
    "backbone": "backbone",
    "width": "widths",
    "depth": "depths",
    "levels": "levels",
    "slice_mode": "slice_mode",
    "norm_affine": "norm_affine",
    "norm_statistics": "norm_statistics",
    "strategy": "strategy",
}
# The same for HydraNets, whose depth is one number.
_HYDRANET_NAMES = {name: name for name in ("n_b", "k", "w_s", "w_b", "w_g", "gate")} | {
    "depth": "d"
}
_PAIR_NAMES = {name: name for name in ("width", "order", "norm", "dense")}
_MODEL_NAMES_OF = {
    "hydranet": _HYDRANET_NAMES,
    "dec3": _PAIR_NAMES,
    "decomposeme": {**_PAIR_NAMES, "skip": "skip", "pool": "pools"},
    "smallnet": SMALLNET_NAMES,
}
_RENAMED = {"task": "tasks"}
_ELSEWHERE = ("resume", "overwrite", "backend", "model")


def _command(family: str, options: list[Option], doc: str) -> Callable[..., None]:
    return make_command(family, options, doc, _train)


def _train(ctx: typer.Context, family: str, values: dict[str, Any]) -> None:
    from pyeff.train.report import train_and_report

    given = {name: value for name, value in values.items() if is_given(ctx, name)}
    with exits_of_training():
        train_and_report(
            _config(family, values, given),
            resume=values["resume"],
            overwrite=values["overwrite"],
            backend=values["backend"],
        )


def _config(command: str, values: dict[str, Any], given: dict[str, Any]) -> Any:
    """The run: from all options, or from a checkpoint's settings and the options given."""
    from pyeff.train import TrainConfig, config_from_json
    from pyeff.train.state import read_config

    chosen = values
    # A HydraNet's command serves several families.
    base: dict[str, Any] = {"model": {"family": values.get("model", command)}}
    if values["resume"]:
        chosen, base = given, read_config(values["out"])
        family = base["model"]["family"]
        wanted = given.get("model", family if family.startswith(f"{command}_") else command)
        if family != wanted:
            raise ValueError(
                f"resume: {values['out']} must be a run of {wanted}, got one of {family}"
            )
        base["out"] = values["out"]
    model = dict(base["model"])
    settings = {k: v for k, v in base.items() if k != "model"}
    chosen = {name: _as_model_has_it(command, name, value) for name, value in chosen.items()}
    names = _MODEL_NAMES_OF.get(command, _MODEL_NAMES)
    for name, value in chosen.items():
        if name in names:
            if value is not None and value != []:
                model[names[name]] = None if value == "none" else value
        elif name not in _ELSEWHERE:
            settings[_RENAMED.get(name, name)] = value
    return config_from_json({**settings, "model": model}) if settings else TrainConfig(model=model)


def _as_model_has_it(command: str, name: str, value: Any) -> Any:
    """An option's value where the words of the command line are not the model's or the run's."""
    from pyeff.train.compress_options import parse_compress

    if name == "compress" and isinstance(value, str):
        return parse_compress(value)
    if command == "decomposeme" and name == "width" and value and len(value) == 1:
        return value[0]
    return value


_SHARING = "Who has its own: private (task and level), task, or shared."
_DVN: list[Option] = [
    ("slice-mode", str, "full", "full, inner or grouped: which channels are cut into units."),
    ("norm-affine", str, "private", f"Batch norm's scale and shift. {_SHARING}"),
    (
        "norm-statistics",
        str,
        "private",
        f"Batch norm's running statistics. {_SHARING} Shared ones collapse at test time.",
    ),
]

train.command("dvn")(
    _command(
        "dvn",
        [*_RUN, *_NETWORK, *_LEVELS, *_DVN],
        "Train a deep virtual network: several tasks, each at every level.\n\n"
        "Example: pyeff train dvn --data data --task cifar100:fine --task cifar100:coarse "
        "--backbone resnet20 --levels 4 --epochs 30 --out runs/dvn",
    )
)
train.command("nestednet")(
    _command(
        "nestednet",
        [
            *_ONE_TASK,
            *_NETWORK,
            *_LEVELS,
            ("strategy", str, "channel", "channel, layer or weight: what a level leaves out."),
        ],
        "Train a NestedNet: one task, nested by channels, layers or single weights.\n\n"
        "Example: pyeff train nestednet --data data --task cifar10 --strategy channel "
        "--levels 3 --out runs/nestednet",
    )
)

_COMPRESS: list[Option] = [
    (
        "compress",
        str | None,
        None,
        "The network learns its own size: group=auto (neurons vanish), rank=auto (layers of low "
        "rank), or both with a comma between; a number is a strength of its own. More options: "
        "alpha, first_layers, first_factor, include_norm, floor, tied, mask, every, form, only_if, "
        "constants, round_to.",
    ),
    ("target-params", float | None, None, "Of --compress: share of the parameters to be left."),
    (
        "reload-epoch",
        int | None,
        None,
        "Of --compress: make the network smaller after so many epochs and train it on; by default "
        "after the last.",
    ),
    (
        "energy",
        float | None,
        None,
        "Of --compress: share of the sum of the singular values that a factored layer keeps; by "
        "default what --target-params asks for, or 0.9.",
    ),
]
_SMALLER = "--compress group=auto,rank=auto --target-params 0.5 --reload-epoch 5"
train.command("backbone")(
    _command(
        "backbone",
        [*_ONE_TASK, *_NETWORK, *_COMPRESS],
        "Train the plain backbone with the same recipe: one task, one level, the baseline.\n\n"
        "Example: pyeff train backbone --data data --task cifar100:fine --backbone resnet20 "
        "--epochs 30 --out runs/dense\n\n"
        f"Example: pyeff train backbone --data data --task cifar100:fine {_SMALLER} "
        "--epochs 30 --out runs/smaller",
    )
)

_PAIRS: list[Option] = [
    ("order", str, "vertical_first", "Of the pairs: vertical_first or horizontal_first."),
    ("norm", str, "both", "Batch norms of a pair: both, inner, outer or none."),
    ("dense", bool, False, "Ordinary convolutions in place of the pairs, to compare with."),
]
train.command("decomposeme")(
    _command(
        "decomposeme",
        [
            *_ONE_TASK,
            (
                "width",
                list[int] | None,
                None,
                "Of the last four layers: 512, 640 or 768; or the widths of all eight, once each.",
            ),
            ("skip", bool, False, "Two more pairs after the seventh and the eighth layer."),
            (
                "pool",
                list[int] | None,
                None,
                "Numbers of the layers after which maps are halved, once for each.",
            ),
            *_PAIRS,
            *_COMPRESS,
        ],
        "Train DecomposeMe: eight pairs of one-dimensional convolutions.\n\n"
        "Example: pyeff train decomposeme --data data --task cifar100:fine --pool 2 --pool 4 "
        f"{_SMALLER} --epochs 30 --out runs/decomposeme",
    )
)
train.command("dec3")(
    _command(
        "dec3",
        [
            *_ONE_TASK,
            ("width", int, 512, "Channels of every layer."),
            *_PAIRS,
            *_COMPRESS,
        ],
        "Train Dec3: three pairs with long kernels, for characters.\n\n"
        "Example: pyeff train dec3 --data data --task chars74k:grey --image-size 24 "
        f"{_SMALLER} --epochs 15 --out runs/dec3",
    )
)
train.command("smallnet")(_command("smallnet", [*with_recipe(_ONE_TASK), *SMALLNET], SMALLNET_DOC))

_HYDRANET: list[Option] = [
    (
        "model",
        str,
        "hydranet_resnet",
        "hydranet_resnet, hydranet_densenet, hydranet_ressep or hydranet_resnet50.",
    ),
    ("n-b", int, 5, "Number of branches; 5 suits the digits, 20 the 100 classes of CIFAR-100."),
    ("k", int, 2, "Branches that run for each image."),
    ("w-s", float | None, None, "Width multiplier of the stem; by default the model's own."),
    ("w-b", float | None, None, "Width multiplier of the branches."),
    ("w-g", float | None, None, "Width multiplier of the gate."),
    ("depth", int | None, None, "Blocks of each stage."),
    (
        "gate",
        str,
        "supervised",
        "supervised (learns which branch owns the class), noisy_topk, or learn (the task's loss).",
    ),
    ("gate-loss-weight", float, 1.0, "Weight of the supervised gate's loss."),
    (
        "teacher-forcing-epochs",
        int,
        0,
        "First epochs in which the branch that owns the class always runs.",
    ),
    (
        "branch-mean",
        str,
        "batch",
        "What a branch's gradient is the mean over: batch, or routed (the images that it got).",
    ),
    (
        "partition",
        str,
        "auto",
        "Which branch owns which class: auto (by a reference classifier), random, or a JSON file.",
    ),
    ("partition-method", str, "greedy", "Of auto: greedy, or assignment (solved as one problem)."),
    ("reference", str | None, None, "Of auto: a trained classifier; by default one is trained."),
    ("reference-backbone", str, "resnet20", "The plain network that is trained so."),
    ("reference-epochs", int | None, None, "Its epochs; by default as many as --epochs."),
]
train.command("hydranet")(
    _command(
        "hydranet",
        [*_ONE_TASK, *_HYDRANET],
        "Train a HydraNet: k of n branches run for each image.\n\n"
        "Example: pyeff train hydranet --data data --task cifar100:fine --n-b 20 --k 4 "
        "--partition auto --epochs 30 --out runs/hydranet",
    )
)
