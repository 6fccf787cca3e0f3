"""What other devices and other problems say of a space: a hint where to look first, never a result.

A past landscape says how much slower than its best each of its configs was, and so what to expect of the same configs here.
Refuses to hand out times: whatever a strategy proposes from it is tried like anything else.
"""

from collections.abc import Sequence

import numpy as np

from harness.gaussian import GaussianProcess
from harness.landscape import Landscape
from harness.space import Config, Space
from harness.surrogate import points
from harness.untried import Floats, Ints, Untried

# A past of fewer numbers says too little.
_FEWEST = 12
# Learned from of each past, where it has to be generalized: so many of the best, and so many of all.
_BEST, _OTHERS = 150, 150
_ROUNDS = 4


def expected_slowdown(past: Sequence[Landscape], space: Space) -> Floats | None:
    """The expected logarithm of slowdown (parts of the past, legal configs of `space`); None where none has the same tunables.

    Times of a past config that is legal here count as they are; a Gaussian process learns the rest from them.
    """
    alike = [one for one in past if {param.name for param in one.params} == set(space.names)]
    untried = Untried(space) if alike else None
    several = [found for one in alike if untried is not None and (found := _slowdown(one, untried)) is not None]
    return np.stack(several) if several else None


def _slowdown(past: Landscape, untried: Untried) -> Floats | None:
    times: dict[int, float | None] = {}
    for config, found in past.recordings.items():
        place = untried.place(Config({name: config[name] for name in untried.space.names}))
        if place is not None:
            times[place] = found.time_ms
    known = {place: time_ms for place, time_ms in times.items() if time_ms is not None}
    if len(known) < _FEWEST:
        return None
    slow = np.full(len(untried.space.legal), np.nan)
    slow[list(known)] = np.log(np.array(list(known.values())) / min(known.values()))
    # What failed there may run here, but it is no place to begin.
    slow[[place for place, time_ms in times.items() if time_ms is None]] = np.nanmax(slow)
    unknown = np.flatnonzero(np.isnan(slow))
    if len(unknown):
        slow[unknown] = _generalized(untried, np.array(list(known)), slow, unknown)
    return slow


def _generalized(untried: Untried, at: Ints, slow: Floats, unknown: Ints) -> Floats:
    """What a Gaussian process makes of the known ones. The same past gives the same answer."""
    rng = np.random.default_rng(0)
    order = at[np.argsort(slow[at], kind="stable")]
    chosen = np.concatenate([order[:_BEST], rng.permutation(order[_BEST:])[:_OTHERS]])
    where = points(untried.space, untried.coordinates)
    process = GaussianProcess(where.shape[1])
    for _ in range(_ROUNDS):
        process.learn(where[chosen], slow[chosen], rng)
    parts = np.array_split(unknown, len(unknown) // 1000 + 1)
    return np.concatenate([process.predict(where[part])[0] for part in parts])
