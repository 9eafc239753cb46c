"""The 1,797 handwritten digits that scikit-learn bundles: data without any file or download."""

import numpy as np
import torch
from torch import Tensor

from pyeff._extras import require

_TEST_IMAGES = 360


def read_digits(
    labels: str,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Reads the digits, split once and for all into 1,437 training and 360 test images.

    Args:
        labels: ``"class"`` (the digit, 10 classes) or ``"parity"`` (even or odd).

    Returns:
        Training and test ``(images uint8 [N, 8, 8, 1], labels int64 [N])``, and class names.

    Raises:
        ImportError: scikit-learn is missing.
    """
    datasets = require("sklearn.datasets", "train", "for the bundled digits")
    bunch = datasets.load_digits()
    # Grey levels 0..16; 15 of 255 each, so that all eight bits are used.
    images = torch.from_numpy((bunch.images * 15).astype(np.uint8)).unsqueeze(-1)
    digit = torch.from_numpy(bunch.target.astype(np.int64))
    target, names = (
        (digit, [str(d) for d in range(10)]) if labels == "class" else (digit % 2, ["even", "odd"])
    )
    # RandomState's stream is frozen by NumPy's promise, so the split never changes.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(digit)))
    train, test = order[_TEST_IMAGES:], order[:_TEST_IMAGES]
    return (images[train], target[train]), (images[test], target[test]), names
