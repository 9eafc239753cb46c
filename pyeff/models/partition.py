"""Cutting the classes into groups that look alike, one for each branch."""

import numpy as np
import torch
from torch import Tensor

METHODS = ("greedy", "assignment", "random")
_ROUNDS = 100  # k-means ends by itself long before
_STARTS = 10


def partition_classes(
    features: Tensor, n_branches: int, method: str = "greedy", seed: int = 0
) -> Tensor:
    """Gives every class to a branch, so that each has as many, alike ones where it can.

    Args:
        features: ``[classes, F]``, the mean output of a reference classifier's last layer over
            images of each class (of the training split).
        n_branches: number of groups.
        method: ``"greedy"`` (the paper's: centroids of k-means take, one after another, their
            nearest free classes; the last gets what is left), ``"assignment"`` (the cheapest
            balanced assignment of classes to the centroids) or ``"random"``.
        seed: of k-means' starts, or of the random groups.

    Returns:
        int64 ``[classes]``: for every class its branch. Groups have ``classes / n_branches``
        members, or the whole numbers next to it. The same for the same input and seed.

    Raises:
        ValueError: features that are not ``[classes, F]`` or hold no finite numbers, fewer classes
            than branches, an unknown method.

    Source: Mullapudi et al., "HydraNets", CVPR 2018, section 3.1 ("greedy"); the public code of
    that step. "assignment" is ours.

    Example:
        >>> features = torch.tensor([[0.0], [9.0], [0.1], [9.1]])
        >>> groups = partition_classes(features, 2)
        >>> bool(groups[0] == groups[2]), bool(groups[1] == groups[3]), groups.bincount().tolist()
        (True, True, [2, 2])
    """
    _check(features, n_branches, method)
    classes = len(features)
    random = np.random.default_rng(seed)
    sizes = _sizes(classes, n_branches)
    if method == "random":
        groups = np.repeat(np.arange(n_branches), sizes)
        return torch.from_numpy(random.permutation(groups))
    points = features.detach().to("cpu", torch.float64).numpy()
    centroids = _k_means(points, n_branches, random)
    distance = _square_distances(points, centroids)
    groups = _greedy(distance, sizes) if method == "greedy" else _assignment(distance, sizes)
    return torch.from_numpy(groups)


def _check(features: Tensor, n_branches: int, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"partition_classes: method must be one of {METHODS}, got {method!r}")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(
            f"partition_classes: features must be [classes, F], got {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("partition_classes: features must be finite, got NaN or infinity")
    if not 1 <= n_branches <= len(features):
        raise ValueError(
            f"partition_classes: n_branches must be in 1..{len(features)} for {len(features)} "
            f"classes, got {n_branches}"
        )


def _sizes(classes: int, groups: int) -> np.ndarray:
    """How many classes each group has: equal, the first ones having one more where need be."""
    return np.array([classes // groups + (g < classes % groups) for g in range(groups)])


def _square_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """``[classes, groups]``."""
    return ((points[:, None, :] - centroids[None, :, :]) ** 2).sum(2)


def _k_means(points: np.ndarray, groups: int, random: np.random.Generator) -> np.ndarray:
    """The best of several runs of Lloyd's algorithm from k-means++ starts: ``[groups, F]``."""
    best, lowest = None, np.inf
    for _ in range(_STARTS):
        centroids = _start(points, groups, random)
        for _ in range(_ROUNDS):
            distance = _square_distances(points, centroids)
            nearest = distance.argmin(1)
            served = distance[np.arange(len(points)), nearest]
            # A centroid that lost all its classes gets the one that is worst served elsewhere.
            for empty in np.setdiff1d(np.arange(groups), nearest):
                shared = np.bincount(nearest, minlength=groups)[nearest] > 1
                nearest[np.where(shared, served, -1).argmax()] = empty
            moved = np.stack([points[nearest == g].mean(0) for g in range(groups)])
            if np.array_equal(moved, centroids):
                break
            centroids = moved
        cost = _square_distances(points, centroids).min(1).sum()
        if cost < lowest:
            best, lowest = centroids, cost
    return best if best is not None else points[:groups]


def _start(points: np.ndarray, groups: int, random: np.random.Generator) -> np.ndarray:
    """k-means++: each further centroid a class, drawn by its squared distance to the others."""
    chosen = [int(random.integers(len(points)))]
    while len(chosen) < groups:
        distance = _square_distances(points, points[chosen]).min(1)
        distance[chosen] = 0
        total = distance.sum()
        free = np.setdiff1d(np.arange(len(points)), chosen)
        if total > 0:
            chosen.append(int(random.choice(len(points), p=distance / total)))
        else:
            chosen.append(int(random.choice(free)))
    return points[chosen]


def _greedy(distance: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Group after group takes its nearest free classes."""
    groups = np.full(len(distance), -1, dtype=np.int64)
    for group, size in enumerate(sizes):
        free = np.flatnonzero(groups < 0)
        nearest = free[np.argsort(distance[free, group], kind="stable")[:size]]
        groups[nearest] = group
    return groups


def _assignment(distance: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The assignment with the smallest sum of distances, each group having its size."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return owner[_hungarian(distance[:, owner])].astype(np.int64)


def _hungarian(cost: np.ndarray) -> np.ndarray:
    """For every row of a square cost matrix its column, at the smallest sum.

    Shortest augmenting paths with dual prices, O(n^3): Kuhn 1955, Munkres 1957.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # the last column is where the next row waits
    for row in range(n):
        row_of[n], column = row, n
        shortest, before = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            here = row_of[column]
            reduced = cost[here] - row_price[here] - column_price[:n]
            better = ~done[:n] & (reduced < shortest)
            shortest[better], before[better] = reduced[better], column
            following = int(np.where(done[:n], np.inf, shortest).argmin())
            step = shortest[following]
            reached = done.copy()
            row_price[row_of[reached]] += step
            column_price[reached] -= step
            shortest[~done[:n]] -= step
            column = following
        while column != n:
            row_of[column] = row_of[before[column]]
            column = before[column]
    result = np.empty(n, dtype=np.int64)
    result[row_of[:n]] = np.arange(n)
    return result
