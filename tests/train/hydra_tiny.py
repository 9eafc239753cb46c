"""The smallest HydraNet run: five branches, two for each image, a hundred digits."""

from train.tiny import tiny_config

MODEL = {"family": "hydranet_resnet", "n_b": 5, "k": 2, "widths": [4, 8, 8]}


def hydra_config(out, **changes):
    settings = {
        "tasks": ("digits",),
        "model": MODEL,
        "partition": "random",
        "reference_backbone": "resnet8",
        "reference_epochs": 1,
    }
    return tiny_config(out, **{**settings, **changes})
