"""The tune: ask for trials until the budget is spent; then race, prove and measure the best, and choose a champion.

It prints nothing: it yields what happened. Every record is in the journal before it is yielded, so stopping at any moment loses
at most the trial in flight.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.lanes import Lanes
from harness.outcome import Estimated, Measured, Proof, Pruned, Record, launches_ms, value_ms
from harness.problem import Problem
from harness.quarantine import Quarantine
from harness.search import BATCH, Strategy
from harness.selection import FINALISTS
from harness.space import Config, Space
from harness.stats import Comparison, compare
from harness.store import Journal
from harness.trials import Flight, Trials
from harness.worker import Runner

# Batches that are in flight where a device measures: while one is measured, the next compiles. A runner with several devices says
# itself how many (`ahead`).
AHEAD = 2
# Configs that compile although nobody has asked for them, where a strategy says what it is likely to ask for: proposals do not
# depend on it, only the time that passes until they are compiled.
EXPECTED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When to stop: after `trials` per problem, or once `seconds` have passed for a problem, whichever is first.

    `now_s` is the clock, in seconds; it never goes back.
    """

    trials: int | None = None
    seconds: float | None = None
    now_s: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to tune: one problem, its space, the default config, and how to search. `first` are tried before the strategy is
    asked: configs that did well on other problems."""

    problem: Problem
    space: Space
    default: Config
    strategy: Strategy
    first: tuple[Config, ...] = ()


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial has ended. `again` says that its record was already in the journal. `best_ms` is the best number so far."""

    problem: Problem
    record: Record
    again: bool
    best_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A problem is done.

    `champion` is None when no candidate passed its gate and its `proof`. `race` is that of the finalists and the default.
    `scores_ms` are the numbers of the screening by config, free of drift.
    `final` holds fresh samples of the best candidate beside the default, and
    `against_default` what they say; both are for times only, never for estimates.
    """

    problem: Problem
    space: Space
    outcomes: Mapping[str, int]
    records: tuple[Record, ...]
    champion: Record | None
    default: Record
    proof: Proof | None = None
    against_default: Comparison | None = None
    final: Record | None = None
    race: Record | None = None
    scores_ms: Mapping[Config, float] = field(default_factory=dict)

    @property
    def value_ms(self) -> float | None:
        """The champion's number: of fresh samples taken after the choice where there are any."""
        if self.champion is None:
            return None
        if self.final is not None and isinstance(self.final.outcome, Measured):
            samples = self.final.outcome.samples
            chosen = self.final.config == self.champion.config
            return samples.median_ms if chosen else float(np.median(samples.incumbent_ms))
        return value_ms(self.champion.outcome)

    @property
    def default_ms(self) -> float | None:
        """The default's number, from the same samples as the champion's where they were taken together."""
        if self.champion is not None and self.champion.config == self.default.config:
            return self.value_ms
        if self.final is not None and self.final.beside is not None and isinstance(self.final.outcome, Measured):
            return float(np.median(self.final.outcome.samples.incumbent_ms))
        return value_ms(self.default.outcome)


def tune(
    task: Task,
    runner: Runner,
    journal: Journal,
    *,
    budget: Budget,
    seed: int,
    quarantine: Quarantine | None = None,
) -> Iterator[Tried | Settled]:
    """Search one problem to the end of the budget, yielding every trial and at last the champion.

    `quarantine` holds those that are not tried at all, and gets those that must not be tried again.
    """
    held = quarantine or Quarantine(None, {})
    several = getattr(runner, "ahead", 0) and runner.mode == "measured"
    trials = (Lanes if several else Trials)(task.problem, task.space, runner, journal, held, budget.now_s)
    yield from _search(task, trials, budget)
    trials.rest()
    yield _settle(task, trials, seed)


def _search(task: Task, trials: Trials, budget: Budget) -> Iterator[Tried]:
    """Every trial until the budget is spent. While some are judged and measured, those that come next already compile."""
    # What is interpreted takes all the cores that compilers would have.
    ahead = getattr(trials.runner, "ahead", 0) or (AHEAD if trials.runner.mode == "measured" else 1)
    started = trials.now_s()
    asked: set[Config] = set()
    # The default comes first, by the strategy; all others are measured beside it.
    given: list[Config] = []
    flying: deque[tuple[Flight, bool, set[Config]]] = deque()
    while True:
        while len(flying) < ahead and not _spent(budget, len(asked), trials.now_s() - started):
            count = BATCH if budget.trials is None else min(BATCH, budget.trials - len(asked))
            configs, own = (given[:count], False) if given else (task.strategy.ask(count), True)
            given = given[count:] if asked else [config for config in task.first if config not in configs]
            if not configs:
                break
            # What the strategy asks for that it was given before costs nothing.
            flying.append((trials.start(configs), own, asked.intersection(configs)))
            asked.update(configs)
        if not flying or _spent(Budget(seconds=budget.seconds), 0, trials.now_s() - started):
            return
        foresee = getattr(task.strategy, "likely", None)
        if foresee is not None and ahead > 1:
            trials.expect(foresee(EXPECTED))
        flight, own, before = flying.popleft()
        for config, record, known in trials.finish(flight):
            if own:
                score = trials.score_ms(record)
                alone = launches_ms(record.outcome)
                tell_launches = getattr(task.strategy, "tell_launches", None)
                if tell_launches is not None and score is not None and alone:
                    # Shares of the number, which is free of drift.
                    tell_launches(config, {name: ms * score / sum(alone.values()) for name, ms in alone.items()})
                task.strategy.tell(config, score)
            if config not in before:
                yield Tried(task.problem, record, known, trials.best_ms)


def _spent(budget: Budget, asked: int, seconds: float) -> bool:
    if budget.trials is not None and asked >= budget.trials:
        return True
    return budget.seconds is not None and seconds >= budget.seconds


def _settle(task: Task, trials: Trials, seed: int) -> Settled:
    default = next((record for record in trials.records if Config(record.config) == task.default), _untried(task))
    finalists = trials.finalists()
    race = _race(trials, finalists, default)
    if race is not None and race.race is not None:
        order = {Config(entrant.config): place for place, entrant in enumerate(race.race.entrants)}
        # Nobody who did not race is better than who did: they were behind in the screening.
        finalists.sort(key=lambda record: order.get(Config(record.config), len(order)))
    best, proof = trials.first_proved(finalists)
    final, comparison = None, None
    if best is not None and isinstance(best.outcome, Measured):
        beside = default if isinstance(default.outcome, Measured) and not _same(default, best) else None
        final = trials.take_fresh(best, beside)
        if isinstance(final.outcome, Measured) and beside is not None:
            samples = final.outcome.samples
            comparison = compare(samples.times_ms, samples.incumbent_ms, rng=np.random.default_rng(seed))
        if beside is not None and (comparison is None or comparison.verdict != "faster"):
            best, proof = trials.first_proved([default, best])
        elif not isinstance(final.outcome, Measured):
            best = None
    return Settled(
        problem=task.problem,
        space=task.space,
        outcomes=dict(sorted(Counter(record.outcome.kind for record in trials.records).items())),
        records=tuple(trials.records),
        champion=best,
        default=default,
        proof=proof if best is not None else None,
        against_default=comparison,
        final=final,
        race=race,
        scores_ms={Config(one.config): score for one in trials.records if (score := trials.score_ms(one)) is not None},
    )


def _race(trials: Trials, finalists: Sequence[Record], default: Record) -> Record | None:
    """The race of the best of the screening, and of the default whatever it was there."""
    entrants = [one for one in finalists if isinstance(one.outcome, Measured)][:FINALISTS]
    if isinstance(default.outcome, Measured) and not any(_same(default, one) for one in entrants):
        entrants.append(default)
    return trials.race(entrants) if len(entrants) > 1 else None


def _same(one: Record, other: Record) -> bool:
    """Whether two candidates are one: the same config, or the same machine code."""
    if one.config == other.config:
        return True
    sides = (one.outcome, other.outcome)
    hashes = [side.artifact.code_hash for side in sides if isinstance(side, Measured | Estimated)]
    return len(hashes) == 2 and hashes[0] == hashes[1]


def _untried(task: Task) -> Record:
    """Stands in for the default when the budget ended before any trial."""
    nothing = Pruned(rule="budget", detail="the budget ended before it was tried")
    return Record(trial=0, problem=task.problem.key, config=dict(task.default), outcome=nothing, seconds=0.0)
