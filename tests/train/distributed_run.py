"""One tiny run; started by torchrun or alone by test_distributed.py."""

import sys

from train.tiny import MODEL, tiny_config

from pyeff.train import Trainer

out, rule, *device = sys.argv[1:]
level_rule, task_rule = rule.split()
levels = 4 if level_rule == "sandwich" else 2
Trainer(
    tiny_config(
        out,
        model={**MODEL, "levels": levels},
        precision="fp64",
        epochs=1,
        limit_test=63,  # an odd number: the two processes have unequal shares
        level_rule=level_rule,
        sandwich_levels=3,
        task_rule=task_rule,
        lr=0.05,
        device=device[0] if device else "cpu",
    )
).fit()
