"""Extremely randomized trees (Geurts, Ernst and Wehenkel 2006) for small samples: all trees grow at once, level by level.

A few hundred samples and some thousand points to predict are what a search asks for after every handful of trials. Grown
one after the other in Python that would take seconds; as arrays over all trees it takes hundredths of one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DEEPEST = 24
_LEAST_GAIN = 1e-12


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees as flat arrays of nodes: `feature` (-1 in a leaf), `threshold`, `left` (the right child lies behind it), `mean`.
    The roots are the first `trees` nodes."""

    trees: int
    feature: Ints
    threshold: Floats
    left: Ints
    mean: Floats

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean over the trees of what they predict for each row of `points` (N, features), and its standard deviation."""
        count, width = points.shape
        flat = np.ascontiguousarray(points).ravel()
        node = np.repeat(np.arange(self.trees), count)
        offset = np.tile(np.arange(count) * width, self.trees)
        live = np.flatnonzero(self.feature[node] >= 0)
        while len(live):
            at = node[live]
            at = self.left[at] + (flat[offset[live] + self.feature[at]] > self.threshold[at])
            node[live] = at
            live = live[self.feature[at] >= 0]
        answers = self.mean[node].reshape(self.trees, count)
        return answers.mean(0), answers.std(0)


@dataclass(slots=True)
class _Level:
    """The nodes of one depth, of all trees: of each sample (of each tree) that has arrived, its row, weight and node."""

    row: Ints
    weight: Floats
    node: Ints
    width: int


def grow(points: Floats, targets: Floats, rng: np.random.Generator, *, trees: int) -> Forest:
    """Fit `trees` trees to `targets` (N,) at `points` (N, features), each on a bootstrap sample, until leaves are pure.

    A node tries one random threshold in every feature and keeps the split that leaves least variance. N must be at least 1.
    """
    count = len(points)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=trees)
    tree, row = np.nonzero(drawn)
    level = _Level(row, drawn[tree, row].astype(float), tree.astype(np.int64), trees)
    made: list[tuple[Ints, Floats, Ints, Floats]] = []
    first = 0
    for depth in range(_DEEPEST):
        total = np.bincount(level.node, level.weight, minlength=level.width).astype(float)
        summed = np.bincount(level.node, level.weight * targets[level.row], minlength=level.width).astype(float)
        feature, threshold = (
            _splits(points, targets, level, total, summed, rng)
            if depth + 1 < _DEEPEST
            else (np.full(level.width, -1), np.zeros(level.width))
        )
        split = feature >= 0
        below = 2 * (np.cumsum(split) - 1)
        made.append((feature, threshold, np.where(split, first + level.width + below, 0), summed / total))
        if not split.any():
            break
        stays = split[level.node]
        row, weight, node = level.row[stays], level.weight[stays], level.node[stays]
        right = points[row, feature[node]] > threshold[node]
        first += level.width
        level = _Level(row, weight, below[node] + right, 2 * int(split.sum()))
    return Forest(trees, *(np.concatenate(parts) for parts in zip(*made, strict=True)))


def _splits(
    points: Floats, targets: Floats, level: _Level, total: Floats, summed: Floats, rng: np.random.Generator
) -> tuple[Ints, Floats]:
    """The best of one random split in each feature, for every node of a level; feature -1 where none gains anything."""
    order = np.argsort(level.node, kind="stable")
    starts = np.searchsorted(level.node[order], np.arange(level.width))
    sorted_points = points[level.row[order]]
    low = np.minimum.reduceat(sorted_points, starts, axis=0)
    high = np.maximum.reduceat(sorted_points, starts, axis=0)
    thresholds = low + rng.random(low.shape) * (high - low)
    weighted = level.weight * targets[level.row]
    unsplit = summed**2 / total
    best = unsplit + _LEAST_GAIN * np.maximum(1.0, np.abs(unsplit))
    feature, threshold = np.full(level.width, -1), np.zeros(level.width)
    for place in np.flatnonzero((high > low).any(0)):
        left = points[level.row, place] <= thresholds[level.node, place]
        total_left = np.bincount(level.node, level.weight * left, minlength=level.width)
        summed_left = np.bincount(level.node, weighted * left, minlength=level.width)
        total_right, summed_right = total - total_left, summed - summed_left
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = summed_left**2 / total_left + summed_right**2 / total_right
        better = (total_left > 0) & (total_right > 0) & (kept > best)
        best[better], feature[better] = kept[better], place
        threshold[better] = thresholds[better, place]
    return feature, threshold
