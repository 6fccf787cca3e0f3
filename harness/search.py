"""Search strategies: which legal config to try next.

Proposals come only from the enumerated list of legal configs, and none is made twice. Optuna owns the study, so that every
trial is kept where optuna's own tools can read it. Refuses to know how a config is judged or timed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import optuna

from harness.errors import BugError, UsageError, did_you_mean
from harness.space import Config, Space
from harness.surrogate import Surrogate

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STARTUP_TRIALS = 8
_SHORTLIST = 512


class Strategy(Protocol):
    """Proposes configs and learns from what became of them."""

    def ask(self, count: int) -> list[Config]:
        """Up to `count` legal configs that were never asked before; fewer at the end of the space, then none."""
        ...

    def tell(self, config: Config, value_ms: float | None) -> None:
        """What became of a config: its number in milliseconds, or None if it has none (failed, wrong, pruned)."""
        ...


class Untried:
    """The legal configs that were not proposed yet, by index, beside their coordinates.

    A coordinate is a parameter's position among its values, scaled to 0 .. 1.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.is_open = np.ones(len(space.legal), dtype=bool)
        # NaN where nothing was told yet, infinite where a config failed.
        self.value_ms = np.full(len(space.legal), np.nan)
        spans = np.maximum([len(param.values) - 1 for param in space.params], 1)
        rows = [list(_positions(space, config).values()) for config in space.legal]
        self.coordinates = np.array(rows, dtype=float).reshape(len(rows), len(space.params)) / spans
        self._spans = spans
        self._index = {config: index for index, config in enumerate(space.legal)}

    def close(self, config: Config) -> None:
        self.is_open[self._index[config]] = False

    def learn(self, config: Config, value_ms: float | None) -> None:
        self.value_ms[self._index[config]] = np.inf if value_ms is None else value_ms

    def nearest(self, positions: Mapping[str, Any], rng: np.random.Generator) -> int:
        """The open config nearest to any assignment of positions, legal or not; ties are broken at random."""
        target = np.array([positions.get(name, 0) for name in self.space.names], dtype=float) / self._spans
        candidates = np.flatnonzero(self.is_open)
        distances = np.abs(self.coordinates[candidates] - target).sum(-1)
        return int(rng.choice(candidates[distances == distances.min()]))

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


Proposer = Callable[[Untried, np.random.Generator, optuna.Study, "FrozenTrial"], int]


def exhaustive(untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
    """Every legal config in the order of the space."""
    return int(np.argmax(untried.is_open))


def random(untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
    """Legal configs in a random order: the baseline that every other strategy has to beat."""
    return int(rng.choice(np.flatnonzero(untried.is_open)))


def tpe(untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
    """Tree-structured Parzen estimator over the whole config (Bergstra et al. 2011; optuna's multivariate TPE).

    Starts with configs that are far from one another. Later samples are moved to the nearest legal config that was not
    tried, because sampling raw values wastes most asks on illegal combinations.
    """
    if np.count_nonzero(~untried.is_open) < STARTUP_TRIALS:
        return untried.farthest(rng)
    seed = int(rng.integers(1 << 31))
    sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=0, seed=seed, constant_liar=True)
    several = {name: values for name, values in _distributions(untried.space).items() if not values.single()}
    sampled = sampler.sample_relative(study, trial, several)
    return untried.nearest(sampled, rng) if sampled else untried.farthest(rng)


# How to make one: some of them remember.
STRATEGIES: Mapping[str, Callable[[], Proposer]] = {
    "surrogate": Surrogate,
    "tpe": lambda: tpe,
    "random": lambda: random,
    "exhaustive": lambda: exhaustive,
}
DEFAULT_STRATEGY = "surrogate"


class StudyStrategy:
    """A strategy whose trials live in an optuna study: every ask opens a trial there, every tell closes it.

    `default`, if there is one, is proposed first. The same seed and the same answers give the same proposals.
    """

    def __init__(
        self, propose: Proposer, space: Space, default: Config | None, *, study: optuna.Study, rng: np.random.Generator
    ) -> None:
        self._study = study
        self._untried = Untried(space)
        self._distributions = _distributions(space)
        self._open: dict[Config, int] = {}
        study.sampler = _LegalSampler(propose, self._untried, rng)
        if space.legal and default is not None:
            study.enqueue_trial(_positions(space, space.check(default)))

    def ask(self, count: int) -> list[Config]:
        asked: list[Config] = []
        while len(asked) < count and self._untried.is_open.any():
            trial = self._study.ask(self._distributions)
            space = self._untried.space
            config = Config({param.name: param.values[trial.params[param.name]] for param in space.params})
            self._untried.close(config)
            self._open[config] = trial.number
            asked.append(config)
        return asked

    def tell(self, config: Config, value_ms: float | None) -> None:
        self._untried.learn(config, value_ms)
        state = optuna.trial.TrialState.FAIL if value_ms is None else optuna.trial.TrialState.COMPLETE
        self._study.tell(self._open.pop(config), value_ms, state=state)


class _LegalSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """The seam to optuna: it asks for a point, we answer with the position of a legal config."""

    def __init__(self, propose: Proposer, untried: Untried, rng: np.random.Generator) -> None:
        self._propose = propose
        self._untried = untried
        self._rng = rng

    def infer_relative_search_space(self, study: optuna.Study, trial: "FrozenTrial") -> "dict[str, BaseDistribution]":
        return _distributions(self._untried.space)

    def sample_relative(
        self, study: optuna.Study, trial: "FrozenTrial", search_space: "dict[str, BaseDistribution]"
    ) -> dict[str, Any]:
        # A queued trial brings its own values; proposing one more would use it up unseen.
        if "fixed_params" in trial.system_attrs:
            return {}
        chosen = self._propose(self._untried, self._rng, study, trial)
        return dict(_positions(self._untried.space, self._untried.space.legal[chosen]))

    def sample_independent(
        self, study: optuna.Study, trial: "FrozenTrial", param_name: str, param_distribution: "BaseDistribution"
    ) -> Any:
        raise BugError(f"optuna asked for `{param_name}` alone, which cannot be chosen legally on its own")


def check_strategy(name: str) -> str:
    """Return `name`, or raise a `UsageError` that suggests a strategy there is."""
    if name not in STRATEGIES:
        raise UsageError(f"no search strategy is called `{name}`", hint=did_you_mean(name, list(STRATEGIES)))
    return name


def make_strategy(
    name: str, space: Space, default: Config | None, *, study: optuna.Study, seed: int
) -> Strategy:
    """A strategy by name, which proposes `default` first if there is one. Raises `UsageError` for a name that it does not know."""
    propose = STRATEGIES[check_strategy(name)]()
    return StudyStrategy(propose, space, default, study=study, rng=np.random.default_rng(seed))


def open_study(name: str, storage: Path | None = None) -> optuna.Study:
    """A new study that minimizes, kept in an append-only file at `storage` (in memory if None).

    A tune replays its journal into a new study instead of continuing an old one, so that an interrupted search goes on
    exactly as an uninterrupted one would have.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage is None:
        return optuna.create_study(study_name=name, direction="minimize")
    storage.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    kept = optuna.storages.JournalStorage(backend)
    return optuna.create_study(study_name=name, direction="minimize", storage=kept)


def _positions(space: Space, config: Config) -> dict[str, int]:
    return {param.name: param.values.index(config[param.name]) for param in space.params}


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    return {param.name: optuna.distributions.IntDistribution(0, len(param.values) - 1) for param in space.params}
