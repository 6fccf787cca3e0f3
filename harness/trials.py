"""The trials of one problem: compile, prune, judge, put a number on, record; and the finalists' race, samples and proof.

What was tried before is taken from the journal. Every record is in the journal before it is given out. Refuses to choose: that is
the tune's.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.compare import Verdict
from harness.outcome import (
    Artifact,
    Estimated,
    Flaky,
    LaunchFailed,
    Measured,
    Proof,
    Record,
    Samples,
    TimedOut,
    Wrong,
    dangerous,
    maybe_innocent,
    value_ms,
)  # fmt: skip
from harness.problem import Problem
from harness.prune import prune
from harness.quarantine import Quarantine
from harness.selection import LOOKS, Course, relative
from harness.space import Config, Space
from harness.store import Journal
from harness.worker import Depth, Passed, Runner

# What took too long or was killed from outside is tried again once, in a later run.
ATTEMPTS = 2
# Wall time of a race, in seconds: the screening of a few candidates more.
RACE_S = 20.0


@dataclass(slots=True)
class Flight:
    """Configs that were asked for together, and what their compilation promises."""

    configs: list[Config]
    known: dict[Config, Record | None]
    compiling: dict[Config, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a candidate ended: its outcome, as that of its `twin` by machine code if it has one, `shared` if the verdict is that of
    another, and which config was timed `beside` it."""

    outcome: Any
    twin: Record | None = None
    shared: bool = False
    beside: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Trials:
    """What was tried of a problem, what compiled to the same code, what the judge already said.

    `anchor` is the candidate that all others are measured beside: the first that has a time, which is the default's if it has
    one. One anchor for all: ratios to whoever is best at the moment would carry along by how much it was lucky. `now_s` is the
    clock, in seconds.
    """

    problem: Problem
    space: Space
    runner: Runner
    journal: Journal
    quarantine: Quarantine
    now_s: Callable[[], float] = time.monotonic
    records: list[Record] = field(default_factory=list)
    anchor: Record | None = None
    best_ms: float | None = None
    _by_code: dict[str, Record] = field(default_factory=dict)
    _verdicts: dict[Config, tuple[Config, Callable[[], Any]]] = field(default_factory=dict)
    _expected: dict[Config, Callable[[], Any]] = field(default_factory=dict)
    _new: set[int] = field(default_factory=set)
    _next: int = 0

    def __post_init__(self) -> None:
        # Trials are numbered through the journal, which several searches of one problem may share.
        tried = (one.trial for one in self.journal.records if one.problem == self.problem.key and one.role == "screen")
        self._next = 1 + max(tried, default=-1)

    def start(self, configs: list[Config]) -> Flight:
        """Begin to compile what was not tried yet."""
        known = {config: self._known(config) for config in configs}
        for config in configs:
            if not self._stands(known[config]):
                self.journal.begin(self.problem.key, config)
        compiling = {
            config: self._expected.pop(config) if config in self._expected else self._compile(config)
            for config in configs
            if not self._stands(known[config])
        }
        return Flight(configs, known, compiling)

    def expect(self, configs: Sequence[Config]) -> None:
        """Begin to compile what may be asked for soon; as many wait to be asked for as are given here at most."""
        for config in configs:
            if len(self._expected) >= len(configs):
                break
            if config not in self._expected and not self._stands(self._known(config)):
                self._expected[config] = self._compile(config)

    def finish(self, flight: Flight) -> Iterator[tuple[Config, Record, bool]]:
        """The trials of a flight, recorded in the order in which they were asked for, whichever is ready first."""
        # One process owns a device, so nothing is gained by compiling all before the first is judged; interpreters are many.
        together = 1 if self.runner.mode == "measured" else len(flight.configs)
        began = self.now_s()
        compiled: dict[Config, Any] = {}
        for place, config in enumerate(flight.configs):
            for other in flight.configs[place : place + together]:
                if other in flight.compiling and other not in compiled and not self._is_new(other):
                    compiled[other] = self._admit(flight.compiling[other](), other)
                    self._judge_soon(other, compiled[other])
            # What was asked for twice may have been finished since.
            record = self._known(config) if self._is_new(config) else flight.known[config]
            again = config not in flight.compiling or self._is_new(config)
            if record is None or not again:
                record = self._finish(config, compiled[config], record, self.now_s() - began)
                began = self.now_s()
                self._append(record)
            self._remember(record)
            yield config, record, again

    def rest(self) -> None:
        """Nothing more is asked for: what is in flight need not be finished."""

    def _append(self, record: Record) -> None:
        self.journal.append(record)
        self._new.add(id(record))

    def _stands(self, record: Record | None) -> bool:
        """Whether a record is the last word on its candidate: what may be another's doing is so when it is seen twice."""
        if record is None:
            return False
        return id(record) in self._new or record.attempt >= ATTEMPTS or not maybe_innocent(record.outcome)

    def _is_new(self, config: Config) -> bool:
        return id(self._known(config)) in self._new

    def _known(self, config: Config) -> Record | None:
        return self.journal.find(self.problem.key, config)

    def _compile(self, config: Config) -> Callable[[], Any]:
        refused = self.quarantine.refusal(self.problem.key, config)
        if refused is not None:
            return lambda: refused
        return self.runner.compile(self.problem, config)

    def _admit(self, result: Any, config: Config) -> Any:
        """The artifact, or the outcome that ends the candidate here."""
        if not isinstance(result, Artifact):
            return result
        return prune(result, config, self.runner.device) or result

    def _judge_soon(self, config: Config, compiled: Any) -> None:
        if not isinstance(compiled, Artifact) or compiled.code_hash in self._by_code:
            return
        key = self._verdict_key(config)
        if key not in self._verdicts:
            self._verdicts[key] = config, self.runner.verify(self.problem, config)

    def _verdict_key(self, config: Config) -> Config:
        """Candidates that the judge cannot tell apart share one run: on a device there are none."""
        if self.runner.mode == "measured":
            return config
        return config.restricted(self.space.interpreted)

    def _finish(self, config: Config, compiled: Any, before: Record | None, seconds: float) -> Record:
        began = self.now_s()
        ended = self._end(config, compiled)
        return self._recorded(config, ended, before, seconds + self.now_s() - began)

    def _end(self, config: Config, compiled: Any) -> "Ended":
        """What becomes of a candidate that was compiled."""
        if not isinstance(compiled, Artifact):
            return Ended(compiled)
        twin = self._by_code.get(compiled.code_hash)
        if twin is not None:
            return Ended(twin.outcome, twin=twin, beside=twin.beside)
        judged, wait = self._verdicts[self._verdict_key(config)]
        beside = self.anchor.config if self.anchor and self.runner.mode == "measured" else None
        return Ended(self._value(config, compiled, wait()), shared=judged != config, beside=beside)

    def _recorded(self, config: Config, ended: "Ended", before: Record | None, seconds: float) -> Record:
        outcome = ended.outcome
        attempt = before.attempt + 1 if before else 1
        if dangerous(outcome) and (not maybe_innocent(outcome) or attempt >= ATTEMPTS):
            self.quarantine.hold(self.problem.key, config, outcome)
        trial = before.trial if before else self._next
        self._next = max(self._next, trial + 1)
        return Record(
            trial=trial,
            problem=self.problem.key,
            config=dict(config),
            outcome=outcome,
            seconds=seconds,
            same_code_as=ended.twin.trial if ended.twin else None,
            shared_verdict=ended.shared,
            beside=ended.beside if isinstance(outcome, Measured) else None,
            attempt=attempt,
        )

    def _value(self, config: Config, artifact: Artifact, judged: Any) -> Any:
        if not isinstance(judged, Verdict):
            return judged
        if not judged.passed:
            return Wrong(verdict=judged) if judged.status == "wrong" else Flaky(verdict=judged)
        anchor = Config(self.anchor.config) if self.anchor else None
        return self._number(config, Passed(artifact, judged), anchor, "screen")

    def _number(self, config: Config, passed: Passed, incumbent: Config | None, depth: Depth) -> Any:
        return self.runner.value(self.problem, config, passed, incumbent=incumbent, depth=depth)()

    def score_ms(self, record: Record) -> float | None:
        """The number of a trial; a time is taken by its ratio to the anchor's, so that what drifts does not count."""
        outcome, anchor = record.outcome, self.anchor
        if isinstance(outcome, Measured) and anchor and isinstance(anchor.outcome, Measured):
            beside = record.beside is not None and dict(record.beside) == dict(anchor.config)
            if beside and outcome.samples.incumbent_ms:
                return relative(outcome.samples) * anchor.outcome.value_ms
        return value_ms(outcome)

    def _remember(self, record: Record) -> None:
        if any(record is one for one in self.records):
            return
        self.records.append(record)
        outcome = record.outcome
        if not isinstance(outcome, Measured | Estimated):
            return
        self._by_code.setdefault(outcome.artifact.code_hash, record)
        if self.anchor is None:
            self.anchor = record
        value = self.score_ms(record)
        if self.best_ms is None or (value is not None and value < self.best_ms):
            self.best_ms = value

    def finalists(self) -> list[Record]:
        """All that have a number, best first. A candidate with the same machine code as another is that candidate."""
        valued = [record for record in self.records if isinstance(record.outcome, Measured | Estimated)]
        distinct = {record.outcome.artifact.code_hash: record for record in reversed(valued)}  # type: ignore[union-attr]
        return sorted(distinct.values(), key=lambda record: (self.score_ms(record), record.trial))

    def race(self, finalists: Sequence[Record]) -> Record | None:
        """Let finalists that were measured race; None if it came to nothing."""
        configs = [Config(record.config) for record in finalists]
        found = self.journal.find_race(self.problem.key, configs)
        if found is not None:
            return found
        began = self.now_s()
        course, ended = Course(configs), ""
        for turn, look in enumerate(LOOKS):
            part = self._part(course, look - course.rounds, turn)
            if part is None:
                ended = "they cannot be measured together"
                break
            course.add(part)
            ended = course.look()
            if ended:
                break
            if self.now_s() - began > RACE_S:
                ended = f"{RACE_S:g} s were over"
                break
        if not course.rounds or not course.running:
            return None
        raced = course.result(ended or f"{course.rounds} rounds were over")
        winner = next(one for one in finalists if dict(one.config) == dict(raced.entrants[0].config))
        assert isinstance(winner.outcome, Measured)
        samples = Samples(times_ms=raced.entrants[0].times_ms, method="race")
        record = Record(
            trial=winner.trial, problem=self.problem.key, config=winner.config, seconds=self.now_s() - began, role="race",
            outcome=Measured(verdict=winner.outcome.verdict, samples=samples, artifact=winner.outcome.artifact), race=raced,
        )  # fmt: skip
        self._append(record)
        return record

    def _part(self, course: Course, rounds: int, turn: int) -> tuple[Samples, ...] | None:
        """The next rounds. Where they fail, each is tried alone: who fails then is out, and the innocent run again."""
        while len(course.running) > 1:
            found = self.runner.race(self.problem, course.running, rounds=rounds, turn=turn)()
            if not isinstance(found, LaunchFailed | TimedOut):
                return found
            guilty = [config for config in course.running if not self._runs_alone(config)]
            for config in guilty:
                course.drop(config, "failed when it was measured again")
            if not guilty:
                # Nobody fails alone: together they may take more memory than there is. The slower half, as screened, makes room.
                kept = max(1, len(course.running) // 2)
                for config in course.running[kept:]:
                    course.drop(config, "could not be measured beside the others")
        return None

    def _runs_alone(self, config: Config) -> bool:
        record = self._known(config)
        assert record is not None and isinstance(record.outcome, Measured)
        passed = Passed(record.outcome.artifact, record.outcome.verdict)
        return isinstance(self._number(config, passed, None, "screen"), Measured)

    def first_proved(self, finalists: Iterable[Record]) -> tuple[Record | None, Proof | None]:
        """The first of `finalists` that passes its proof, and that proof."""
        for record in finalists:
            found = self._proved(record)
            if found.proof is not None and found.proof.passed:
                return record, found.proof
        return None, None

    def _proved(self, finalist: Record) -> Record:
        config = Config(finalist.config)
        found = self.journal.find_proof(self.problem.key, config)
        if found is not None and self._stands(found):
            return found
        began = self.now_s()
        answer = self.runner.prove(self.problem, config)()
        proof = answer if isinstance(answer, Proof) else None
        outcome: Any = answer
        if proof is not None:
            outcome = finalist.outcome if proof.passed else _not_proved(self.problem, proof)
        record = Record(
            trial=finalist.trial, problem=self.problem.key, config=finalist.config, outcome=outcome,
            seconds=self.now_s() - began, role="proof", proof=proof, attempt=found.attempt + 1 if found else 1,
        )  # fmt: skip
        self._append(record)
        return record

    def take_fresh(self, best: Record, beside: Record | None, role: Literal["final", "shared"] = "final") -> Record:
        """Measure a candidate again, beside another, with samples that had no part in any choice."""
        other = Config(beside.config) if beside else None
        found = self._fresh(best, other, role)
        if found is not None and isinstance(found.outcome, Measured):
            return found
        assert isinstance(best.outcome, Measured)
        began = self.now_s()
        passed = Passed(best.outcome.artifact, best.outcome.verdict)
        outcome = self._number(Config(best.config), passed, other, "final")
        record = Record(
            trial=best.trial,
            problem=self.problem.key,
            config=best.config,
            outcome=outcome,
            seconds=self.now_s() - began,
            role=role,
            beside=other and dict(other),
        )
        self._append(record)
        return record

    def _fresh(self, best: Record, other: Config | None, role: str) -> Record | None:
        if role == "shared" and other is not None:
            return self.journal.find_shared(self.problem.key, best.config, other)
        return self.journal.find_final(self.problem.key, best.config, other)


def _not_proved(problem: Problem, proof: Proof) -> Wrong | Flaky:
    status: Literal["wrong", "unknown"] = "wrong" if proof.status == "wrong" else "unknown"
    verdict = Verdict(
        status=status, where=proof.where, oracle="the whole suite", cases=(problem.key,), seed=proof.seed, checks=(),
        detail=proof.detail,
    )  # fmt: skip
    return Wrong(verdict=verdict) if status == "wrong" else Flaky(verdict=verdict)
