"""One tiny HydraNet run; started by torchrun or alone by test_hydranet_distributed.py."""

import sys

from train.hydra_tiny import hydra_config

from pyeff.train import Trainer

Trainer(
    hydra_config(
        sys.argv[1],
        partition="auto",
        precision="fp64",
        epochs=1,
        limit_test=63,  # an odd number: the two processes have unequal shares
        lr=0.05,
    )
).fit()
