"""Search launch by launch: where launches of an operation do not interact, what one trial says of each is learned for each.

A space of m configs of one launch times n of another is then searched as two of m and n: every trial tries a promising half of
either, and the best halves known are put together at once, so that one measurement of the whole confirms them. Where launches
interact, and while single launches have no times, the search is the joint one. Refuses to call the sum of halves a time.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from harness.gaussian import GaussianProcess
from harness.space import Apart, Config, Value
from harness.surrogate import expected_improvement, points
from harness.untried import Floats, Untried

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Before this many halves are known of each launch, the joint search spreads its first trials.
_FEWEST = 8
# Of so many proposals one is the joint search's: it alone knows the configs whose launches interact.
_TURNS = 4
# Halves of each launch that are looked at together, best first, until a config of them is legal and was not tried.
_PAIRED = 12
# A half that failed beside so many others is given up: either may be to blame, and which is not known.
_FAILURES = 2

Half = tuple[Value, ...]


class LaunchByLaunch:
    """A proposer (`harness.search.Proposer`) around a joint one."""

    def __init__(self, joint: Callable[..., int], apart: Apart) -> None:
        self._joint = joint
        self._apart = apart
        self._turn = 0
        self._parts: dict[str, _Part] = {}
        self._told = -1

    def __call__(self, untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
        if not self._parts:
            self._parts = {name: _Part(untried, self._apart, name) for name in self._apart.tunables}
        if len(untried.launches_ms) >= _FEWEST:
            found = self._together(untried, rng)
            if found is not None:
                return found
        return self._joint(untried, rng, study, trial)

    def likely(self, untried: Untried, count: int) -> list[int]:
        """What the joint search would propose; of pairs of halves nothing is known before the next number."""
        foresee = getattr(self._joint, "likely", None)
        return [] if foresee is None else foresee(untried, count)

    def _together(self, untried: Untried, rng: np.random.Generator) -> int | None:
        around = self._best_around(untried)
        if around is None:
            return None
        if len(untried.launches_ms) != self._told:
            self._told = len(untried.launches_ms)
            for part in self._parts.values():
                part.learn(untried, around, rng)
        best = {name: part.best() for name, part in self._parts.items()}
        if all(best.values()):
            index = self._place(untried, around, {name: half for name, half in best.items() if half is not None})
            if index is not None:
                return index
        self._turn += 1
        if self._turn % _TURNS == 0:
            return None
        ranked = {name: part.ranked(untried) for name, part in self._parts.items()}
        for depth in range(_PAIRED):
            # One step down the list of one launch at a time: what promises most of each comes first.
            halves = {name: several[min(depth, len(several) - 1)] for name, several in ranked.items() if several}
            if len(halves) < len(ranked):
                return None
            index = self._place(untried, around, halves)
            if index is not None:
                for name, half in halves.items():
                    self._parts[name].asked(half, index)
                return index
        return None

    def _best_around(self, untried: Untried) -> Config | None:
        """The best config of which single launches are known: what it has beside the tunables of these is kept."""
        known = [index for index in untried.best() if index in untried.launches_ms]
        apart = (untried.space.legal[index] for index in known)
        return next((config for config in apart if self._apart.holds(config)), None)

    def _place(self, untried: Untried, around: Config, halves: Mapping[str, Half]) -> int | None:
        """The index of the config of these halves, if it is legal and was not tried."""
        values: dict[str, Any] = dict(around)
        for name, half in halves.items():
            values |= dict(zip(self._apart.tunables[name], half, strict=True))
        index = untried.place(Config(values))
        return index if index is not None and untried.is_open[index] else None


class _Part:
    """The halves of one launch: which there are, what was told of them, what a Gaussian process makes of that."""

    def __init__(self, untried: Untried, apart: Apart, name: str) -> None:
        self._apart, self._name = apart, name
        self._tunables, self._kernels = apart.tunables[name], apart.kernels[name]
        self._others = [
            each for each in untried.space.names if all(each not in some for some in apart.tunables.values())
        ]
        legal = [(index, config) for index, config in enumerate(untried.space.legal) if apart.holds(config)]
        first: dict[Half, int] = {}
        for index, config in legal:
            first.setdefault(self._half(config), index)
        self._halves = list(first)
        self._index = {half: place for place, half in enumerate(self._halves)}
        columns = [place for place, each in enumerate(untried.space.names) if each in self._tunables]
        several = [place for place in columns if len(untried.space.params[place].values) > 1]
        where = points(untried.space, untried.coordinates[list(first.values())])
        # `points` leaves out what has one value only.
        kept = [place for place, param in enumerate(untried.space.params) if len(param.values) > 1]
        self._points: Floats = where[:, [kept.index(place) for place in several]] if several else where[:, :1]
        self._process = GaussianProcess(self._points.shape[1])
        self._times = np.full(len(self._halves), np.nan)
        self._promise = np.zeros(len(self._halves))
        self._asked: dict[int, list[int]] = {}

    def _half(self, config: Mapping[str, Value]) -> Half:
        return tuple(config[name] for name in self._tunables)

    def learn(self, untried: Untried, around: Config, rng: np.random.Generator) -> None:
        """Learn anew what was told of configs that agree with `around` in all that is no launch's own."""
        self._times[:] = np.nan
        for index, alone in untried.launches_ms.items():
            config = untried.space.legal[index]
            time_ms = sum(alone.get(kernel, 0.0) for kernel in self._kernels)
            if time_ms > 0 and self._apart.holds(config) and all(config[each] == around[each] for each in self._others):
                place = self._index[self._half(config)]
                self._times[place] = np.nanmin([self._times[place], time_ms])
        known = np.isfinite(self._times)
        if np.count_nonzero(known) < 2:
            return
        targets = np.log(self._times[known])
        self._process.learn(self._points[known], targets, rng)
        mean, deviation = self._process.predict(self._points)
        self._promise = expected_improvement(mean, deviation, float(targets.min()))

    def best(self) -> Half | None:
        known = np.isfinite(self._times)
        return self._halves[int(np.nanargmin(self._times))] if known.any() else None

    def asked(self, half: Half, index: int) -> None:
        """It is being tried, in the config at `index`."""
        self._asked.setdefault(self._index[half], []).append(index)

    def _hopeful(self, place: int, untried: Untried) -> bool:
        """Whether a half that is not known is worth another trial: not while one is under way, nor after it failed beside two."""
        tried = self._asked.get(place, [])
        return len(tried) < _FAILURES and not any(np.isnan(untried.value_ms[index]) for index in tried)

    def ranked(self, untried: Untried) -> list[Half]:
        """Halves that were not tried, most promising first; at the end of them, those that were, best first."""
        order = np.argsort(-self._promise, kind="stable")
        new = [int(each) for each in order if np.isnan(self._times[each]) and self._hopeful(int(each), untried)]
        known = [int(each) for each in np.argsort(self._times, kind="stable") if np.isfinite(self._times[each])]
        return [self._halves[each] for each in [*new[:_PAIRED], *known[:_PAIRED]]]
