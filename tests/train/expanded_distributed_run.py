"""One tiny run of an expanded network; started by torchrun or alone by test_train_expanded.py."""

import sys

from train.tiny import tiny_config

from pyeff.train import Trainer

(out,) = sys.argv[1:]
Trainer(
    tiny_config(
        out,
        tasks=("digits:class",),
        model={"family": "smallnet", "expand": "ck+fc", "rate": 1, "form": "contracted"},
        precision="fp64",
        epochs=1,
        limit_test=63,
        lr=0.05,
        weight_decay=0.05,
        weight_decay_on="product",
    )
).fit()
