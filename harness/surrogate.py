"""Strategies that learn: a model of what was tried ranks the legal configs that were not.

Half of the proposals are neighbours of the best configs so far, and half are wherever the model sees most to gain. Refuses to
propose by raw values: the whole list of legal configs is at hand.
"""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from harness.forest import grow
from harness.gaussian import GaussianProcess
from harness.space import Param, Space
from harness.untried import Floats, Ints, Untried

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


# Matrices of a few hundred rows gain nothing from threads, and lose much where compilers use every core.
_THREADS = ThreadpoolController()

# Configs far from one another before anything is learned.
_STARTUP = 16
# Neighbours are those of so many of the best.
_LEADERS = 2
# Ranked at a time: all neighbours, and at least so many others drawn anew each time.
_OTHERS, _RANKED = 200, 1000
# Parts of the past that a model learns from by themselves, beside the mean of all.
_HINTS = 4
_TREES = 50
# The share of trials that are good ones, in likelihood-free optimization.
_GOOD = 0.15
# So many trials are little to learn from: several models are heard.
_LITTLE = 64


class Model(Protocol):
    """Ranks configs by what was told of others."""

    def learn(self, points: Floats, targets: Floats, rng: np.random.Generator) -> None:
        """Learn from `targets` (N,), less is better, at `points` (N, d)."""
        ...

    def promise(self, points: Floats) -> Floats:
        """What each row of `points` promises, more is better."""
        ...


class Expecting:
    """Expected improvement (Jones, Schonlau and Welch 1998) under a Gaussian process."""

    def __init__(self, dimensions: int) -> None:
        self._process = GaussianProcess(dimensions)
        self._best = math.inf

    def learn(self, points: Floats, targets: Floats, rng: np.random.Generator) -> None:
        self._best = float(targets.min())
        self._process.learn(points, targets, rng)

    def promise(self, points: Floats) -> Floats:
        return expected_improvement(*self._process.predict(points), self._best)


class Woods:
    """Expected improvement under a random forest (Hutter, Hoos and Leyton-Brown 2011)."""

    def __init__(self, dimensions: int) -> None:
        self._best = math.inf

    def learn(self, points: Floats, targets: Floats, rng: np.random.Generator) -> None:
        self._best = float(targets.min())
        self._forest = grow(points, targets, rng, trees=_TREES)

    def promise(self, points: Floats) -> Floats:
        return expected_improvement(*self._forest.predict(points), self._best)


class Classifying:
    """Likelihood-free optimization (Song et al. 2022): the probability of being among the good ones, which count by how good."""

    def __init__(self, dimensions: int) -> None:
        pass

    def learn(self, points: Floats, targets: Floats, rng: np.random.Generator) -> None:
        line = float(np.quantile(targets, _GOOD))
        gains = np.maximum(line - targets, 0)
        # With the gains scaled to a mean of 1, a forest that averages them classifies by the weighted label.
        self._forest = grow(points, gains / max(float(gains.mean()), 1e-12), rng, trees=_TREES)

    def promise(self, points: Floats) -> Floats:
        return self._forest.predict(points)[0]


class Surrogate:
    """Proposes by the index of a legal config; its model learns again whenever something was told since the last time."""

    def __init__(self, model: Callable[[int], Model]) -> None:
        self._make = model
        self._model: Model | None = None
        self._points: Floats = np.empty((0, 0))
        self._told = -1
        self._turn = 0
        # Indices of legal configs in order of promise, and of those the neighbours of the best.
        self._ranked: Ints = np.empty(0, dtype=np.int64)
        self._near: Ints = np.empty(0, dtype=np.int64)

    def __call__(self, untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
        told = ~np.isnan(untried.value_ms)
        startup = _STARTUP if untried.expected is None else 0
        if np.count_nonzero(~untried.is_open) < startup or np.count_nonzero(np.isfinite(untried.value_ms)) < 2:
            return untried.farthest(rng)
        if np.count_nonzero(told) != self._told:
            self._told = int(np.count_nonzero(told))
            with _THREADS.limit(limits=1, user_api="blas"):
                self._learn(untried, told, rng)
        self._turn += 1
        for several in (self._near if self._turn % 2 else self._ranked, self._ranked):
            open_ = several[untried.is_open[several]]
            if len(open_):
                return int(open_[0])
        return int(rng.choice(np.flatnonzero(untried.is_open)))

    def likely(self, untried: Untried, count: int) -> list[int]:
        """What it would propose next, if nothing more was learned."""
        several = [several[untried.is_open[several]][:count] for several in (self._near, self._ranked)]
        return [int(index) for index in dict.fromkeys(np.concatenate(several))][:count]

    def _learn(self, untried: Untried, told: NDArray[np.bool_], rng: np.random.Generator) -> None:
        if self._model is None:
            self._points = points(untried.space, untried.coordinates)
            if untried.expected is not None:
                # What is expected is one more thing to learn from: as much as it turns out to tell.
                hints = np.concatenate([untried.expected.mean(0, keepdims=True), untried.expected[:_HINTS]]).T
                spans = np.maximum(np.ptp(hints, axis=0), 1e-12)
                self._points = np.concatenate([self._points, (hints - hints.min(0)) / spans], axis=1)
            self._model = self._make(self._points.shape[1])
        valid = np.isfinite(untried.value_ms)
        targets = np.full(len(valid), np.nan)
        targets[valid] = np.log(untried.value_ms[valid])
        # What failed is as bad as the worst that did not: its neighbours are avoided, and nothing is out of scale.
        targets[told & ~valid] = targets[valid].max()
        self._model.learn(self._points[told], targets[told], rng)
        leaders = np.flatnonzero(told)[np.argsort(targets[told], kind="stable")[:_LEADERS]]
        open_ = np.flatnonzero(untried.is_open)
        differing = (untried.coordinates[open_][:, None] != untried.coordinates[leaders][None]).sum(-1).min(1)
        rest = open_[differing > 2]
        count = min(len(rest), max(_OTHERS, _RANKED - (len(open_) - len(rest))))
        pool = np.concatenate([open_[differing <= 2], rng.choice(rest, count, replace=False)])
        promise = self._model.promise(self._points[pool])
        # Equals are in no order but a random one.
        order = np.lexsort((rng.random(len(pool)), -promise))
        self._ranked = pool[order]
        near = np.concatenate([differing[differing <= 2], np.full(count, 3)])[order] == 1
        self._near = self._ranked[near]


class Ensemble:
    """Surrogates in turns while little is known: what one finds, all learn from, and where one is blind, another may see. Then
    the first alone, which makes most of much."""

    def __init__(self, *members: Surrogate) -> None:
        self._members = members
        self._turn = 0

    def __call__(self, untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
        self._turn += 1
        several = self._heard(untried)
        return several[self._turn % len(several)](untried, rng, study, trial)

    def likely(self, untried: Untried, count: int) -> list[int]:
        """What its members would propose next, if nothing more was learned: the first of each, then the second of each."""
        several = [member.likely(untried, count) for member in self._heard(untried)]
        each = (index for row in itertools.zip_longest(*several) for index in row if index is not None)
        return list(dict.fromkeys(each))[:count]

    def _heard(self, untried: Untried) -> tuple[Surrogate, ...]:
        return self._members if np.count_nonzero(~untried.is_open) < _LITTLE else self._members[:1]


def ensemble() -> Ensemble:
    """A Gaussian process, a forest that classifies and one that does not."""
    return Ensemble(gp(), lfbo(), forest())


def gp() -> Surrogate:
    """With a Gaussian process."""
    return Surrogate(Expecting)


def forest() -> Surrogate:
    """With a random forest."""
    return Surrogate(Woods)


def lfbo() -> Surrogate:
    """With a forest that classifies."""
    return Surrogate(Classifying)


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """How far below `best` a normal distribution lies in the mean, where it lies below; all in the unit of `best`."""
    deviation = np.maximum(deviation, 1e-9)
    z = (best - mean) / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    return np.asarray(deviation * (z * below + density))


def points(space: Space, coordinates: Floats) -> Floats:
    """Where configs lie for a model, (configs, parameters with several values), from 0 to 1: numbers half way between the
    position in their list and their logarithm, because tiles double and counts do not."""
    columns = []
    for place, param in enumerate(space.params):
        last = len(param.values) - 1
        if not last:
            continue
        column = coordinates[:, place]
        if _is_scale(param):
            logs = np.log2([float(value) for value in param.values])
            column = (column + ((logs - logs.min()) / np.ptp(logs))[np.rint(column * last).astype(int)]) / 2
        columns.append(column)
    return np.stack(columns, axis=1) if columns else np.zeros((len(coordinates), 1))


def _is_scale(param: Param) -> bool:
    """Whether its values are three or more positive numbers."""
    numbers = [value for value in param.values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(param.values) > 2 and min(numbers) > 0
