"""One tiny run with a reload; started by torchrun or alone by test_train_compressed.py."""

import sys

from train.tiny import tiny_config

from pyeff.train import Trainer

Trainer(
    tiny_config(
        sys.argv[1],
        tasks=("digits",),
        model={"family": "backbone", "backbone": "resnet8", "widths": [16, 16, 16]},
        precision="fp64",
        epochs=3,
        limit_test=63,  # an odd number: the two processes have unequal shares
        lr=0.05,
        compress={"group": "auto", "rank": "auto"},
        target_params=0.6,
        reload_epoch=2,
    )
).fit()
