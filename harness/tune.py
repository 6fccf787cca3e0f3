"""The tune: ask, compile, prune, judge, put a number on, record; then choose a champion for each problem.

The only module that knows the order of all stages. It prints nothing: it yields what happened. Every record is in the
journal before it is yielded, so stopping at any moment loses at most the trials in flight.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.compare import Verdict
from harness.outcome import Artifact, Estimated, Flaky, Measured, Proof, Pruned, Record, Wrong, value_ms
from harness.problem import Problem
from harness.prune import prune
from harness.search import BATCH, Strategy
from harness.space import Config, Space
from harness.stats import Comparison, compare
from harness.store import Journal
from harness.worker import Depth, Passed, Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When to stop: after `trials` per problem, or once `seconds` have passed for a problem, whichever is first."""

    trials: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to tune: one problem, its space, the default config, and how to search."""

    problem: Problem
    space: Space
    default: Config
    strategy: Strategy


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

    `champion` is None when no candidate passed its gate and its `proof`.
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


def tune(task: Task, runner: Runner, journal: Journal, *, budget: Budget, seed: int) -> Iterator[Tried | Settled]:
    """Search one problem to the end of the budget, yielding every trial and at last the champion."""
    search = _Search(task, runner, journal)
    started = time.monotonic()
    while not _spent(budget, search.tried, time.monotonic() - started):
        count = BATCH if budget.trials is None else min(BATCH, budget.trials - search.tried)
        configs = task.strategy.ask(count)
        if not configs:
            break
        for config, record, again in search.run(configs):
            task.strategy.tell(config, value_ms(record.outcome))
            yield Tried(task.problem, record, again, search.best_ms)
    yield _settle(task, search, seed)


def _spent(budget: Budget, tried: int, seconds: float) -> bool:
    if budget.trials is not None and tried >= budget.trials:
        return True
    return budget.seconds is not None and seconds >= budget.seconds


class _Search:
    """The trials of one problem: what was tried, what compiled to the same code, what the judge already said."""

    def __init__(self, task: Task, runner: Runner, journal: Journal) -> None:
        self._task = task
        self._runner = runner
        self._journal = journal
        self._by_code: dict[str, Record] = {}
        self._verdicts: dict[Config, tuple[Config, Callable[[], Any]]] = {}
        # Trials are numbered through the journal, which several searches of one problem may share.
        self._next = sum(record.problem == task.problem.key and record.role == "screen" for record in journal.records)
        self.records: list[Record] = []
        self.incumbent: Record | None = None

    @property
    def tried(self) -> int:
        return len(self.records)

    @property
    def best_ms(self) -> float | None:
        return value_ms(self.incumbent.outcome) if self.incumbent else None

    def run(self, configs: list[Config]) -> Iterator[tuple[Config, Record, bool]]:
        """Try configs together; they are recorded in the order given, whichever is ready first."""
        problem = self._task.problem
        known = {config: self._journal.find(problem.key, config) for config in configs}
        compiling = {config: self._runner.compile(problem, config) for config in configs if known[config] is None}
        began = time.monotonic()
        compiled = {}
        for config, wait in compiling.items():
            compiled[config] = self._admit(wait(), config)
            artifact = compiled[config]
            if isinstance(artifact, Artifact) and artifact.code_hash not in self._by_code:
                self._judge_soon(config)
        for config in configs:
            record = known[config]
            again = record is not None
            if record is None:
                record = self._finish(config, compiled[config], time.monotonic() - began)
                began = time.monotonic()
                self._journal.append(record)
            self._remember(record)
            yield config, record, again

    def _admit(self, result: Any, config: Config) -> Any:
        """The artifact, or the outcome that ends the candidate here."""
        if not isinstance(result, Artifact):
            return result
        return prune(result, config, self._runner.device) or result

    def _judge_soon(self, config: Config) -> None:
        key = self._verdict_key(config)
        if key not in self._verdicts:
            self._verdicts[key] = config, self._runner.verify(self._task.problem, config)

    def _verdict_key(self, config: Config) -> Config:
        """Candidates that the judge cannot tell apart share one run: on a device there are none."""
        if self._runner.mode == "measured":
            return config
        return config.restricted(self._task.space.interpreted)

    def _finish(self, config: Config, compiled: Any, seconds: float) -> Record:
        shared = False
        twin = None
        outcome = compiled
        if isinstance(compiled, Artifact):
            twin = self._by_code.get(compiled.code_hash)
            if twin is not None:
                outcome = twin.outcome
            else:
                judged, wait = self._verdicts[self._verdict_key(config)]
                shared = judged != config
                outcome = self._value(config, compiled, wait())
        self._next += 1
        return Record(
            trial=self._next - 1,
            problem=self._task.problem.key,
            config=dict(config),
            outcome=outcome,
            seconds=seconds,
            same_code_as=twin.trial if twin else None,
            shared_verdict=shared,
        )

    def _value(self, config: Config, artifact: Artifact, judged: Any) -> Any:
        if not isinstance(judged, Verdict):
            return judged
        if not judged.passed:
            return Wrong(verdict=judged) if judged.status == "wrong" else Flaky(verdict=judged)
        incumbent = Config(self.incumbent.config) if self.incumbent else None
        return self._number(config, Passed(artifact, judged), incumbent, "screen")

    def first_proved(self, finalists: Iterable[Record]) -> tuple[Record | None, Proof | None]:
        """The first of `finalists` that passes its proof, and that proof."""
        for record in finalists:
            found = self._proved(record)
            if found.proof is not None and found.proof.passed:
                return record, found.proof
        return None, None

    def _proved(self, finalist: Record) -> Record:
        config = Config(finalist.config)
        found = self._journal.find_proof(self._task.problem.key, config)
        if found is not None:
            return found
        began = time.monotonic()
        answer = self._runner.prove(self._task.problem, config)()
        proof = answer if isinstance(answer, Proof) else None
        outcome: Any = answer
        if proof is not None:
            outcome = finalist.outcome if proof.passed else _not_proved(self._task.problem, proof)
        record = Record(
            trial=finalist.trial, problem=self._task.problem.key, config=finalist.config, outcome=outcome,
            seconds=time.monotonic() - began, role="proof", proof=proof,
        )  # fmt: skip
        self._journal.append(record)
        return record

    def take_final(self, best: Record, beside: Record | None) -> Record:
        """Measure the best again, beside the default, with samples that had no part in the choice."""
        other = Config(beside.config) if beside else None
        found = self._journal.find_final(self._task.problem.key, best.config, other)
        if found is not None and isinstance(found.outcome, Measured):
            return found
        assert isinstance(best.outcome, Measured)
        began = time.monotonic()
        passed = Passed(best.outcome.artifact, best.outcome.verdict)
        outcome = self._number(Config(best.config), passed, other, "final")
        record = Record(
            trial=best.trial,
            problem=self._task.problem.key,
            config=best.config,
            outcome=outcome,
            seconds=time.monotonic() - began,
            role="final",
            beside=other and dict(other),
        )
        self._journal.append(record)
        return record

    def _number(self, config: Config, passed: Passed, incumbent: Config | None, depth: Depth) -> Any:
        return self._runner.value(self._task.problem, config, passed, incumbent=incumbent, depth=depth)()

    def _remember(self, record: Record) -> None:
        self.records.append(record)
        outcome = record.outcome
        if not isinstance(outcome, Measured | Estimated):
            return
        self._by_code.setdefault(outcome.artifact.code_hash, record)
        if self.best_ms is None or outcome.value_ms < self.best_ms:
            self.incumbent = record


def _settle(task: Task, search: _Search, seed: int) -> Settled:
    default = next((record for record in search.records if Config(record.config) == task.default), _untried(task))
    valued = [record for record in search.records if isinstance(record.outcome, Measured | Estimated)]
    # A candidate with the same machine code as another is that candidate. The sort keeps the first of equals first.
    distinct = {record.outcome.artifact.code_hash: record for record in reversed(valued)}  # type: ignore[union-attr]
    finalists = sorted(distinct.values(), key=lambda record: (value_ms(record.outcome), record.trial))
    best, proof = search.first_proved(finalists)
    final, comparison = None, None
    if best is not None and isinstance(best.outcome, Measured):
        beside = default if isinstance(default.outcome, Measured) and default is not best else None
        final = search.take_final(best, beside)
        if isinstance(final.outcome, Measured) and beside is not None:
            samples = final.outcome.samples
            comparison = compare(samples.times_ms, samples.incumbent_ms, rng=np.random.default_rng(seed))
        if beside is not None and (comparison is None or comparison.verdict != "faster"):
            best, proof = search.first_proved([default, best])
        elif not isinstance(final.outcome, Measured):
            best = None
    return Settled(
        problem=task.problem,
        space=task.space,
        outcomes=dict(sorted(Counter(record.outcome.kind for record in search.records).items())),
        records=tuple(search.records),
        champion=best,
        default=default,
        proof=proof if best is not None else None,
        against_default=comparison,
        final=final,
    )


def _not_proved(problem: Problem, proof: Proof) -> Wrong | Flaky:
    status: Literal["wrong", "unknown"] = "wrong" if proof.status == "wrong" else "unknown"
    verdict = Verdict(
        status=status, where=proof.where, oracle="the whole suite", cases=(problem.key,), seed=proof.seed, checks=(),
        detail=proof.detail,
    )  # fmt: skip
    return Wrong(verdict=verdict) if status == "wrong" else Flaky(verdict=verdict)


def _untried(task: Task) -> Record:
    """Stands in for the default when the budget ended before any trial."""
    nothing = Pruned(rule="budget", detail="the budget ended before it was tried")
    return Record(trial=0, problem=task.problem.key, config=dict(task.default), outcome=nothing, seconds=0.0)
