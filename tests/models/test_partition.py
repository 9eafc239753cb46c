import itertools

import pytest
import torch

from pyeff.models import hydranet, partition_classes
from pyeff.models.partition import _hungarian


def clusters(groups, size, noise=0.05):
    """Well-separated groups of classes in mixed order, and which belongs where."""
    owner = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size)]
    centres = 10 * torch.randn(groups, 8)
    return centres[owner] + noise * torch.randn(groups * size, 8), owner


@pytest.mark.parametrize("method", ["greedy", "assignment"])
def test_finds_the_clusters(method):
    features, owner = clusters(6, 5)
    found = partition_classes(features, 6, method)
    assert found.dtype == torch.int64
    pairs = set(zip(found.tolist(), owner.tolist(), strict=True))
    assert len(pairs) == 6  # one to one


@pytest.mark.parametrize("method", ["greedy", "assignment", "random"])
@pytest.mark.parametrize(("classes", "groups"), [(100, 20), (10, 3), (7, 7), (5, 1), (23, 5)])
def test_is_balanced_and_repeatable(method, classes, groups):
    features = torch.randn(classes, 4)
    found = partition_classes(features, groups, method, seed=3)
    sizes = found.bincount(minlength=groups)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == classes
    assert torch.equal(found, partition_classes(features.double(), groups, method, seed=3))


def test_random_depends_on_the_seed_alone():
    features = torch.randn(100, 4)
    first = partition_classes(features, 20, "random", seed=0)
    assert torch.equal(first, partition_classes(-features, 20, "random", seed=0))
    assert not torch.equal(first, partition_classes(features, 20, "random", seed=1))


def test_greedy_leaves_the_rest_to_the_last():
    # Two centroids, at 0 and 10, of four and two classes; three classes each are wanted.
    features = torch.tensor([[0.0], [0.1], [-0.1], [0.4], [10.0], [10.1]])
    for method in ("greedy", "assignment"):
        found = partition_classes(features, 2, method)
        assert found[4] == found[5]
        assert (found[:4] == found[4]).tolist() == [False, False, False, True]


def test_assignment_never_costs_more_than_greedy():
    for seed in range(5):
        features = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed))
        spread = {}
        for method in ("greedy", "assignment"):
            found = partition_classes(features, 6, method, seed=seed)
            means = torch.stack([features[found == g].mean(0) for g in range(6)])
            spread[method] = (features - means[found]).square().sum()
        assert spread["assignment"] <= spread["greedy"] * 1.05
        assert spread["assignment"] < (features - features.mean(0)).square().sum()


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_assignment_is_the_cheapest(n):
    for _ in range(10):
        cost = torch.rand(n, n, dtype=torch.float64).numpy()
        found = _hungarian(cost)
        best = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
        assert sorted(found.tolist()) == list(range(n))
        assert cost[range(n), found].sum() == pytest.approx(best)


def test_equal_features_are_shared_out_all_the_same():
    for method in ("greedy", "assignment"):
        sizes = partition_classes(torch.zeros(12, 3), 4, method).bincount()
        assert sizes.tolist() == [3, 3, 3, 3]


def test_is_found_where_the_documentation_says():
    assert hydranet.partition_classes is partition_classes


def test_errors():
    features = torch.randn(10, 4)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'best'"):
        partition_classes(features, 2, "best")
    with pytest.raises(ValueError, match=r"n_branches must be in 1\.\.10 for 10 classes, got 11"):
        partition_classes(features, 11)
    with pytest.raises(ValueError, match=r"features must be \[classes, F\], got \[10\]"):
        partition_classes(features[:, 0], 2)
    features[3, 1] = float("nan")
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
        partition_classes(features, 2)
