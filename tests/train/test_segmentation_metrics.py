import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from pyeff.train.processes import Processes
from pyeff.train.segmentation_data import IGNORE, SegmentationData, SegmentationSplit
from pyeff.train.segmentation_metrics import evaluate_segmentation

NAMES = ("a", "b", "c", "d")


class Reads(nn.Module):
    """Predicts what the first channel says, as exact logits, at a part of the size."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride, self.unused = stride, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        classes = (x[:, 0] * 255).round().long()[:, :: self.stride, :: self.stride]
        return nn.functional.one_hot(classes, 4).permute(0, 3, 1, 2).float()


def data_of(predicted, labels, own=None):
    images = predicted.unsqueeze(3).expand(*predicted.shape, 3).to(torch.uint8).contiguous()
    own = labels if own is None else own
    names = tuple(map(str, range(len(labels))))
    split = SegmentationSplit(images, labels.to(torch.uint8), names, lambda i: own[i].byte())
    return SegmentationData("made up", NAMES, ((0, 0, 0),) * 4, {"train": split, "val": split})


def test_scores_equal_torchmetrics():
    predicted, labels = torch.randint(0, 4, (5, 6, 7)), torch.randint(0, 4, (5, 6, 7))
    labels[0, :3] = IGNORE
    (score,) = evaluate_segmentation(Reads(), data_of(predicted, labels), "val", batch_size=2)
    jaccard = MulticlassJaccardIndex(4, average=None, ignore_index=IGNORE)
    assert list(score.class_iou.values()) == pytest.approx(jaccard(predicted, labels).tolist())
    macro = MulticlassJaccardIndex(4, ignore_index=IGNORE)
    assert score.miou == pytest.approx(float(macro(predicted, labels)))
    right = MulticlassAccuracy(4, average="micro", ignore_index=IGNORE)
    assert score.pixel_accuracy == pytest.approx(float(right(predicted, labels)))
    assert (score.split, score.eval_size, score.size, score.images) == (
        "val",
        "training",
        (6, 7),
        5,
    )


def test_classes_that_are_nowhere_are_left_out():
    predicted = torch.tensor([[[0, 0], [1, 1]]])
    labels = torch.tensor([[[0, 0], [0, 1]]])
    (score,) = evaluate_segmentation(Reads(), data_of(predicted, labels), "val")
    assert score.class_iou == {"a": pytest.approx(2 / 3), "b": 0.5, "c": None, "d": None}
    assert score.miou == pytest.approx((2 / 3 + 0.5) / 2)
    # A class that is only predicted counts, as wrong.
    (score,) = evaluate_segmentation(Reads(), data_of(labels.clone().fill_(3), labels), "val")
    assert score.class_iou == {"a": 0.0, "b": 0.0, "c": None, "d": 0.0}


def test_official_size_is_the_labels_own():
    predicted = torch.tensor([[[0, 1], [2, 3]]])
    own = predicted.repeat_interleave(4, 1).repeat_interleave(4, 2)
    own[0, 0] = IGNORE
    training, official = evaluate_segmentation(
        Reads(), data_of(predicted, predicted, own), "val", official=True
    )
    assert (training.eval_size, training.size) == ("training", (2, 2))
    assert (official.eval_size, official.size) == ("official", (8, 8))
    assert training.miou == official.miou == 1.0
    own[0, -1] = 0  # wrong at the own size alone: 4 of 56 pixels each of c and d
    training, official = evaluate_segmentation(
        Reads(), data_of(predicted, predicted, own), "val", official=True
    )
    assert training.pixel_accuracy == 1.0
    assert official.pixel_accuracy == pytest.approx(1 - 8 / 56)


def test_own_sizes_may_differ():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    own = [torch.zeros(8, 8), torch.zeros(6, 10)]
    _, official = evaluate_segmentation(Reads(), data_of(labels, labels, own), "val", official=True)
    assert official.size is None
    assert official.pixel_accuracy == 1.0


class First(Processes):
    """The first of two processes, which keeps what it contributes to sums."""

    given: list = []  # noqa: RUF012

    def sum(self, values):
        self.given.append(values.clone())
        return values


class Second(First):
    """The other one, in the same sums."""

    def sum(self, values):
        return values + self.given.pop(0)


def test_the_size_is_that_of_all_processes():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    data = data_of(labels, labels, [torch.zeros(8, 8), torch.zeros(6, 10)])
    for kind, size in ((First, (8, 8)), (Second, None)):
        who = kind(int(kind is Second), 2, torch.device("cpu"))
        training, official = evaluate_segmentation(
            Reads(), data, "val", official=True, processes=who
        )
        assert (training.size, official.size) == ((4, 4), size)


def test_smaller_logits_are_scaled_up():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4:] = 2
    (score,) = evaluate_segmentation(Reads(stride=4), data_of(labels, labels), "val")
    assert score.size == (8, 8)
    assert score.miou == 1.0


def test_nothing_labelled():
    labels = torch.full((1, 2, 2), IGNORE)
    (score,) = evaluate_segmentation(Reads(), data_of(torch.zeros(1, 2, 2), labels), "val")
    assert (score.miou, score.pixel_accuracy) == (0.0, 0.0)
    assert set(score.class_iou.values()) == {None}
