"""What other devices and other problems say of a space: a hint where to look first, never a result.

A past landscape says how much slower than its best each of its configs was, and so what to expect of the same configs here.
Refuses to hand out times: whatever a strategy proposes from it is tried like anything else.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harness.gaussian import GaussianProcess
from harness.landscape import Landscape
from harness.space import Config, Space
from harness.surrogate import points

Floats = NDArray[np.float64]

# A past of fewer numbers says too little.
_FEWEST = 12
# Learned from of each past, where it has to be generalized: so many of the best, and so many of all.
_BEST, _OTHERS = 150, 150
_ROUNDS = 4


def expected_slowdown(past: Sequence[Landscape], space: Space) -> Floats | None:
    """The expected logarithm of slowdown (parts of the past, legal configs of `space`); None where none has the same tunables.

    Times of a past config that is legal here count as they are; a Gaussian process learns the rest from them.
    """
    several = [found for one in past if (found := _slowdown(one, space)) is not None]
    return np.stack(several) if several else None


def _slowdown(past: Landscape, space: Space) -> Floats | None:
    if {param.name for param in past.params} != set(space.names):
        return None
    index = {config: place for place, config in enumerate(space.legal)}
    known = [
        (index[ours], found.time_ms)
        for config, found in past.recordings.items()
        if found.time_ms is not None and (ours := Config({name: config[name] for name in space.names})) in index
    ]
    if len(known) < _FEWEST:
        return None
    failed = [
        index[ours] for config, found in past.recordings.items()
        if found.time_ms is None and (ours := Config({name: config[name] for name in space.names})) in index
    ]  # fmt: skip
    slow = np.full(len(space.legal), np.nan)
    at, times = np.array([place for place, _ in known]), np.array([time for _, time in known])
    slow[at] = np.log(times / times.min())
    # What failed there may run here, but it is no place to begin.
    slow[failed] = np.nanmax(slow)
    unknown = np.flatnonzero(np.isnan(slow))
    if len(unknown):
        slow[unknown] = _generalized(space, at, slow, unknown)
    return slow


def _generalized(space: Space, at: NDArray[np.int64], slow: Floats, unknown: NDArray[np.int64]) -> Floats:
    """What a Gaussian process makes of the known ones. The same past gives the same answer."""
    rng = np.random.default_rng(0)
    order = at[np.argsort(slow[at], kind="stable")]
    chosen = np.concatenate([order[:_BEST], rng.permutation(order[_BEST:])[:_OTHERS]])
    spans = np.maximum([len(param.values) - 1 for param in space.params], 1)
    places = [{value: place for place, value in enumerate(param.values)} for param in space.params]
    rows = [[place[config[name]] for place, name in zip(places, space.names, strict=True)] for config in space.legal]
    coordinates = points(space, np.array(rows, dtype=float) / spans)
    process = GaussianProcess(coordinates.shape[1])
    for _ in range(_ROUNDS):
        process.learn(coordinates[chosen], slow[chosen], rng)
    parts = np.array_split(unknown, len(unknown) // 1000 + 1)
    return np.concatenate([process.predict(coordinates[part])[0] for part in parts])
