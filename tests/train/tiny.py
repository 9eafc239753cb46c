"""The smallest run that has everything: two tasks, two levels, four hundred digits."""

from pyeff.train import TrainConfig

MODEL = {"family": "dvn", "backbone": "resnet8", "levels": 2, "widths": [4, 8, 8]}


def tiny_config(out, **changes):
    settings = {
        "tasks": ("digits:class", "digits:parity"),
        "model": MODEL,
        "out": str(out),
        "epochs": 2,
        "batch_size": 32,
        "limit_train": 96,
        "limit_test": 64,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})
