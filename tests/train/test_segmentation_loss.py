import math

import pytest
import torch
from torch.nn import functional

from pyeff.train.schedule import poly_learning_rate
from pyeff.train.segmentation_data import IGNORE
from pyeff.train.segmentation_loss import class_counts, class_weights, pixel_loss, targets_for


def alone(values):
    return values


def test_weights_of_cityscapes_histogram():
    """Road's and car's share of the pixels give the published weights of both stages."""
    shares = torch.tensor([32.65, 6.20, 100 - 32.65 - 6.20], dtype=torch.float64)
    assert class_weights(shares, 1.10).tolist() == pytest.approx([2.815, 6.66], rel=1e-3)


def test_unlabelled_pixels_are_in_the_denominator():
    labels = torch.tensor([[[0, 0, 1, IGNORE]]], dtype=torch.uint8)
    counts = class_counts(labels, 3)
    assert counts.tolist() == [2, 1, 0, 1]
    weights = class_weights(counts, 1.2)
    assert weights.tolist() == pytest.approx(
        [1 / math.log(1.2 + 0.5), 1 / math.log(1.2 + 0.25), 1 / math.log(1.2)]
    )


def test_counts_of_many_pictures_and_of_an_eighth():
    labels = torch.randint(0, 3, (130, 16, 8), dtype=torch.uint8)
    whole = torch.bincount(labels.reshape(-1).int(), minlength=4).double()
    assert torch.equal(class_counts(labels, 3), whole)
    eighth = torch.bincount(labels[:, 4::8, 4::8].reshape(-1).int(), minlength=4).double()
    assert torch.equal(class_counts(labels, 3, 8), eighth)


def test_targets_take_the_middle_of_their_cell():
    labels = torch.arange(24 * 16).view(1, 24, 16)
    assert torch.equal(targets_for(labels, 8), labels[:, 4::8, 4::8])
    assert targets_for(labels, 1) is labels


@pytest.mark.parametrize(
    ("height", "rows"),
    # The middle of the last cell: at row 20, at row 20 of 21, beyond row 19 of 20.
    [(24, [4, 12, 20]), (21, [4, 12, 20]), (20, [4, 12, IGNORE])],
)
def test_targets_beyond_the_picture_are_ignored(height, rows):
    labels = torch.arange(height).view(1, height, 1).expand(1, height, 8)
    assert targets_for(labels, 8)[0, :, 0].tolist() == rows


def test_loss_is_the_weighted_mean_of_labelled_pixels():
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    targets = torch.randint(0, 4, (2, 5, 6))
    targets[0, :2] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = functional.cross_entropy(
        logits, targets, weight=weights.double(), ignore_index=IGNORE
    )
    torch.testing.assert_close(
        pixel_loss(logits, targets, weights, alone), expected, rtol=1e-12, atol=0
    )


def test_two_halves_have_the_loss_of_the_whole():
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    targets = torch.randint(0, 4, (2, 5, 6))
    targets[0, :4] = IGNORE  # unequal shares of the labelled pixels
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    whole = pixel_loss(logits, targets, weights, alone)
    totals = []
    for row in range(2):
        pixel_loss(
            logits[row : row + 1], targets[row : row + 1], weights, lambda t: totals.append(t) or t
        )
    mean = sum(totals) / 2
    halves = [
        pixel_loss(logits[r : r + 1], targets[r : r + 1], weights, lambda t: mean) for r in range(2)
    ]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)


def test_a_batch_without_labels_teaches_nothing():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 2, 2), IGNORE), torch.ones(3), alone)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_poly_schedule():
    rates = [poly_learning_rate(e, 4, peak=2.0, power=0.9) for e in range(4)]
    assert rates[0] == 2.0
    assert rates[3] == pytest.approx(2 * 0.25**0.9)
    assert rates == sorted(rates, reverse=True)
