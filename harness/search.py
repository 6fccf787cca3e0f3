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
from harness.launchwise import LaunchByLaunch
from harness.space import Config, Space
from harness.surrogate import ensemble, forest, gp, lfbo
from harness.untried import Floats, Untried, positions

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

# Trials that are asked for together. A constant, not the number of cores: proposals must not depend on the machine.
BATCH = 4
STARTUP_TRIALS = 8
# Parents of a new config are among so many of the best.
_PARENTS = 12


class Strategy(Protocol):
    """Proposes configs and learns from what became of them."""

    def ask(self, count: int) -> list[Config]:
        """Up to `count` legal configs that were never asked before; fewer at the end of the space, then none."""
        ...

    def tell(self, config: Config, value_ms: float | None) -> None:
        """What became of a config: its number in milliseconds, or None if it has none (failed, wrong, pruned)."""
        ...


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


def local(untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
    """Greedy search from a start that fills the space: a random neighbour, in one parameter, of the best config that has one."""
    if np.count_nonzero(~untried.is_open) < 2 * STARTUP_TRIALS:
        return untried.farthest(rng)
    open_ = np.flatnonzero(untried.is_open)
    for index in untried.best():
        near = open_[(untried.coordinates[open_] != untried.coordinates[index]).sum(-1) == 1]
        if len(near):
            return int(rng.choice(near))
    return int(rng.choice(open_))


def genetic(untried: Untried, rng: np.random.Generator, study: optuna.Study, trial: "FrozenTrial") -> int:
    """A genetic algorithm without generations: a child of two of the best takes each parameter from either, and mutates one
    on average; the nearest config that is legal and was not tried stands for it."""
    parents = untried.best()[:_PARENTS]
    if np.count_nonzero(~untried.is_open) < 2 * STARTUP_TRIALS or len(parents) < 2:
        return int(rng.choice(np.flatnonzero(untried.is_open)))
    one, other = untried.coordinates[rng.choice(parents, 2, replace=False)]
    child = np.where(rng.random(len(one)) < 0.5, one, other)
    donor = untried.coordinates[rng.integers(len(untried.coordinates))]
    return untried.closest(np.where(rng.random(len(child)) < 1 / len(child), donor, child), rng)


# How to make one: some of them remember.
STRATEGIES: Mapping[str, Callable[[], Proposer]] = {
    "ensemble": ensemble,
    "gp": gp,
    "forest": forest,
    "lfbo": lfbo,
    "tpe": lambda: tpe,
    "genetic": lambda: genetic,
    "local": lambda: local,
    "random": lambda: random,
    "exhaustive": lambda: exhaustive,
}
DEFAULT_STRATEGY = "ensemble"
# Baselines, which learn from nothing.
UNLEARNED = ("random", "exhaustive")


class StudyStrategy:
    """A strategy whose trials live in an optuna study: every ask opens a trial there, every tell closes it.

    `default`, if there is one, is proposed first. The same seed and the same answers give the same proposals.
    """

    def __init__(
        self,
        propose: Proposer,
        untried: Untried,
        default: Config | None,
        *,
        study: optuna.Study,
        rng: np.random.Generator,
    ) -> None:
        self._study = study
        self._propose = propose
        self._untried = untried
        space = untried.space
        self._distributions = _distributions(space)
        self._open: dict[Config, int] = {}
        study.sampler = _LegalSampler(propose, self._untried, rng)
        if space.legal and default is not None:
            study.enqueue_trial(positions(space, space.check(default)))

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

    def likely(self, count: int) -> list[Config]:
        """Up to `count` configs that may well be asked for next: they can be compiled before. Asking changes nothing."""
        foresee = getattr(self._propose, "likely", None)
        found = [] if foresee is None else foresee(self._untried, count)
        return [self._untried.space.legal[index] for index in found]

    def tell_launches(self, config: Config, launches_ms: Mapping[str, float]) -> None:
        """What each launch of a config takes, by its kernel, before the config's own number is told."""
        self._untried.learn_launches(config, launches_ms)

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
        chosen = self._untried.first()
        if chosen is None:
            chosen = self._propose(self._untried, self._rng, study, trial)
        return dict(positions(self._untried.space, self._untried.space.legal[chosen]))

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
    name: str, space: Space, default: Config | None, *, study: optuna.Study, seed: int, expected: Floats | None = None
) -> Strategy:
    """A strategy by name, which proposes `default` first if there is one, then some of those of which most is `expected`, if
    anything is (`harness.experience.expected_slowdown`). Raises `UsageError` for a name that it does not know."""
    propose = STRATEGIES[check_strategy(name)]()
    if space.apart is not None and name not in UNLEARNED:
        propose = LaunchByLaunch(propose, space.apart)
    untried = Untried(space, None if name in UNLEARNED else expected)
    return StudyStrategy(propose, untried, default, study=study, rng=np.random.default_rng(seed))


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


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    return {param.name: optuna.distributions.IntDistribution(0, len(param.values) - 1) for param in space.params}
