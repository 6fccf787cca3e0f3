"""The default strategy: a forest learns from what was tried, and ranks every legal config that was not.

Half of the proposals are neighbours of the best configs, ranked by what the forest expects, and half are where the expected
improvement (Jones, Schonlau and Welch 1998) is greatest, wherever that is. Refuses to propose by raw values: the whole list of
legal configs is at hand.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import optuna
from numpy.typing import NDArray

from harness.forest import Floats, grow
from harness.space import Param, Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from harness.search import Untried

# Configs far from one another before anything is learned.
_STARTUP = 16
_TREES = 50
# Neighbours are those of so many of the best.
_LEADERS = 2


class Surrogate:
    """Proposes by the index of a legal config; it learns again whenever something was told since the last time."""

    def __init__(self) -> None:
        self._features: Floats | None = None
        self._told = -1
        self._expected: Floats = np.empty(0)
        self._improvement: Floats = np.empty(0)
        self._turn = 0

    def __call__(
        self, untried: "Untried", rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial"
    ) -> int:
        valid = np.isfinite(untried.value_ms)
        closed = int(np.count_nonzero(~untried.is_open))
        if closed < _STARTUP or np.count_nonzero(valid) < 2:
            return untried.farthest(rng)
        self._learn(untried, rng)
        self._turn += 1
        open_ = np.flatnonzero(untried.is_open)
        near = self._neighbours(untried, open_) if self._turn % 2 else open_[:0]
        if len(near):
            return int(near[np.argmin(self._expected[near])])
        return int(open_[np.argmax(self._improvement[open_])])

    def _learn(self, untried: "Untried", rng: np.random.Generator) -> None:
        told = ~np.isnan(untried.value_ms)
        if np.count_nonzero(told) == self._told:
            return
        self._told = int(np.count_nonzero(told))
        if self._features is None:
            self._features = features(untried.space, untried.coordinates)
        valid = np.isfinite(untried.value_ms)
        targets = np.full(len(valid), np.nan)
        targets[valid] = np.log(untried.value_ms[valid])
        # What failed is as bad as the worst that did not: its neighbours are avoided, and nothing is out of scale.
        targets[told & ~valid] = targets[valid].max()
        forest = grow(self._features[told], targets[told], rng, trees=_TREES)
        mean, deviation = forest.predict(self._features)
        # Equals are in no order but a random one.
        noise = 1e-9 * rng.random((2, len(mean)))
        self._expected = mean + noise[0]
        self._improvement = expected_improvement(mean, deviation, targets[told].min()) + 1e-3 * noise[1]

    def _neighbours(self, untried: "Untried", open_: NDArray[np.int64]) -> NDArray[np.int64]:
        """Open configs that differ from one of the best in one parameter, or in two where there are none."""
        values = np.where(np.isnan(untried.value_ms), np.inf, untried.value_ms)
        leaders = untried.coordinates[np.argsort(values, kind="stable")[:_LEADERS]]
        differing = (untried.coordinates[open_][:, None] != leaders[None]).sum(-1).min(1)
        near = open_[differing == 1]
        return near if len(near) else open_[differing <= 2]


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """How far below `best` a normal distribution lies in the mean, where it lies below; all in the unit of `best`."""
    deviation = np.maximum(deviation, 1e-9)
    z = (best - mean) / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    return np.asarray(deviation * (z * below + density))


def features(space: Space, coordinates: Floats) -> Floats:
    """What trees split by, (configs, features): the position of each parameter, and of numbers the logarithms of their
    products, and of how often two divides them: tiles, threads and vectors are products, and powers of two are special."""
    columns = [coordinates]
    logs, twos = [], []
    for place, param in enumerate(space.params):
        if not _is_scale(param):
            continue
        positions = np.rint(coordinates[:, place] * max(len(param.values) - 1, 1)).astype(int)
        numbers = np.array([float(value) for value in param.values])
        logs.append(np.log2(numbers)[positions])
        whole = all(number.is_integer() for number in numbers)
        if whole and any(math.log2(number) % 1 for number in numbers):
            twos.append(np.array([_twos(int(number)) for number in numbers], dtype=float)[positions])
    columns += [(one + two)[:, None] for turn, one in enumerate(logs) for two in logs[:turn]]
    columns += [one[:, None] for one in twos]
    columns += [np.sum(several, axis=0)[:, None] for several in (logs, twos) if len(several) > 2]
    return np.concatenate(columns, axis=1)


def _is_scale(param: Param) -> bool:
    """Whether its values are three or more positive numbers."""
    numbers = [value for value in param.values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(param.values) > 2 and min(numbers) > 0


def _twos(number: int) -> int:
    return (number & -number).bit_length() - 1
