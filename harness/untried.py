"""The legal configs of a space that a search has not proposed yet, beside what is known of the others. Refuses to choose."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.space import Config, Space

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SHORTLIST = 512
# With something expected, so many are tried on its word alone.
_TRUSTED = 8


class Untried:
    """The legal configs that were not proposed yet, by index, beside their coordinates.

    A coordinate is a parameter's position among its values, scaled to 0 .. 1.
    """

    def __init__(self, space: Space, expected: Floats | None = None) -> None:
        self.space = space
        # What several parts of the past lead to expect of each config (parts, configs), less is better, if there is a past.
        self.expected = expected
        self.is_open = np.ones(len(space.legal), dtype=bool)
        # NaN where nothing was told yet, infinite where a config failed.
        self.value_ms = np.full(len(space.legal), np.nan)
        spans = np.maximum([len(param.values) - 1 for param in space.params], 1)
        rows = [list(positions(space, config).values()) for config in space.legal]
        # What single launches of a config take, by kernel, where that was told.
        self.launches_ms: dict[int, Mapping[str, float]] = {}
        self.coordinates = np.array(rows, dtype=float).reshape(len(rows), len(space.params)) / spans
        self._spans = spans
        self._index = {config: index for index, config in enumerate(space.legal)}

    def place(self, config: Config) -> int | None:
        """The index of a config among the legal ones, or None if it is none."""
        return self._index.get(config)

    def close(self, config: Config) -> None:
        self.is_open[self._index[config]] = False

    def learn(self, config: Config, value_ms: float | None) -> None:
        self.value_ms[self._index[config]] = np.inf if value_ms is None else value_ms

    def learn_launches(self, config: Config, launches_ms: Mapping[str, float]) -> None:
        self.launches_ms[self._index[config]] = launches_ms

    def nearest(self, point: Mapping[str, Any], rng: np.random.Generator) -> int:
        """The open config nearest to any assignment of positions, legal or not; ties are broken at random."""
        return self.closest(np.array([point.get(name, 0) for name in self.space.names], dtype=float) / self._spans, rng)

    def closest(self, target: Floats, rng: np.random.Generator) -> int:
        """The open config nearest to coordinates, the sum of differences counting; ties are broken at random."""
        candidates = np.flatnonzero(self.is_open)
        distances = np.abs(self.coordinates[candidates] - target).sum(-1)
        return int(rng.choice(candidates[distances == distances.min()]))

    def best(self) -> Ints:
        """What was told and did not fail, best first."""
        order = np.argsort(self.value_ms, kind="stable")
        return order[: np.count_nonzero(np.isfinite(self.value_ms))]

    def first(self) -> int | None:
        """The open config of which most is expected, as long as few were tried: by all of the past and by one part of
        it in turn, as one may be alike and the others not."""
        tried = np.count_nonzero(~self.is_open)
        if self.expected is None or tried >= _TRUSTED:
            return None
        turn, alone = divmod(tried, 2)
        opinion = self.expected[turn % len(self.expected)] if alone else self.expected.mean(0)
        return int(np.argmin(np.where(self.is_open, opinion, np.inf)))

    def farthest(self, rng: np.random.Generator) -> int:
        """An open config whose nearest tried one is as far as possible, among a random shortlist."""
        candidates = np.flatnonzero(self.is_open)
        if len(candidates) > _SHORTLIST:
            candidates = rng.choice(candidates, _SHORTLIST, replace=False)
        tried = self.coordinates[~self.is_open]
        if not len(tried):
            return int(rng.choice(candidates))
        distances = np.abs(self.coordinates[candidates][:, None] - tried[None]).sum(-1).min(1)
        return int(candidates[np.argmax(distances)])


def positions(space: Space, config: Config) -> dict[str, int]:
    """The place of each value of a config among the values of its parameter."""
    return {param.name: param.values.index(config[param.name]) for param in space.params}
