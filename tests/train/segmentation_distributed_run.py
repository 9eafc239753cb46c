"""One tiny run for segmentation; started by torchrun or alone."""

import sys

from torchvision_operators import torchvision_loads
from train.segmentation_tiny import MODEL, segmentation_config

from pyeff.train.segmentation_trainer import SegmentationTrainer

torchvision_loads()
SegmentationTrainer(
    segmentation_config(
        sys.argv[1],
        # Dropout is drawn by each process for its own pictures.
        model={**MODEL, "dropout": [0.0, 0.0]},
        precision="fp64",
        epochs=1,
        eval_size="official",
    )
).fit()
