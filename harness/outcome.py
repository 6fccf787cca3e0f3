"""What became of a candidate: a sum type, its record, and their JSON.

Refuses the lie: a time or an estimate cannot be built without a passing verdict. Failure is a value here; only a broken
invariant raises. JSON goes both ways through `RECORDS`; non-finite floats travel as strings.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from harness.compare import Verdict

_VALUE = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

Stage = Literal["compile", "verify", "measure", "estimate", "prove"]
Mode = Literal["measured", "estimated", "replayed"]


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Loop:
    """One loop of a binary: instructions by class in one iteration. `classes` as in `Binary.instructions`."""

    instructions: Mapping[str, int]
    matrix_flops: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Binary:
    """The compiled form of one launch. `spill_bytes` per thread; `shared_bytes` per block; `warps` as really launched
    (warp specialization adds some); `instructions` counts by class over the whole code; `code_hash` of the machine code."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    instructions: Mapping[str, int]
    loops: tuple[Loop, ...]
    code_hash: str
    specialized: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Artifact:
    """The compiled form of a candidate: a binary for each launch. `compile_ms` is wall time, 0 when found in a cache.

    Without binaries its code could not be read here; `unread` then stands for it, and no other candidate has the same."""

    binaries: tuple[Binary, ...]
    toolchain: str
    compile_ms: float = 0.0
    unread: str = ""

    @property
    def code_hash(self) -> str:
        return "+".join(binary.code_hash for binary in self.binaries) or self.unread


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Samples:
    """Raw times of one candidate in milliseconds, in the order in which they were taken.

    `incumbent_ms` are those of the incumbent, interleaved with them (empty when there was none). `clocks_mhz` was read
    beside the samples (empty when it could not be). `method` names the timer. `throttled` says that something lowered the
    clock meanwhile, `throttle` what; `temperature_c` and `power_w` are the most that was read, and `canary_ms` the time of a
    kernel that never changes, right before: what drifts in it drifts in all. None where it could not be read. `launches_ms` are
    medians of each launch alone, by its kernel, where there are several; they need not add up to the time of all.
    """

    times_ms: tuple[float, ...]
    incumbent_ms: tuple[float, ...] = ()
    clocks_mhz: tuple[int, ...] = ()
    method: str = ""
    throttled: bool = False
    throttle: tuple[str, ...] = ()
    temperature_c: int | None = None
    power_w: float | None = None
    canary_ms: float | None = None
    launches_ms: Mapping[str, float] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        times = (*self.times_ms, *self.incumbent_ms)
        if not self.times_ms or not all(math.isfinite(time) and time > 0 for time in times):
            raise ValueError(f"samples must be positive finite times, found {times}")

    @property
    def median_ms(self) -> float:
        ordered = sorted(self.times_ms)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Estimate:
    """A predicted time in milliseconds, with the terms it was made of (milliseconds or as the name says), and what of it each
    launch takes, by its kernel, where there are several."""

    value_ms: float
    terms: Mapping[str, float]
    model: str
    launches_ms: Mapping[str, float] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value_ms) and self.value_ms > 0):
            raise ValueError(f"an estimate must be a positive finite time, found {self.value_ms}")


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Pruned:
    """A static rule refused the compiled candidate; `rule` names it, `detail` says what it needs and what there is."""

    rule: str
    detail: str
    kind: Literal["pruned"] = "pruned"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class CompileFailed:
    """The compiler refused, aborted, or ran out of memory."""

    reason: str
    log: str = ""
    kind: Literal["compile_failed"] = "compile_failed"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class LaunchFailed:
    """The kernel could not be launched or crashed while it ran; `stage` says during what."""

    stage: Stage
    reason: str
    log: str = ""
    kind: Literal["launch_failed"] = "launch_failed"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class TimedOut:
    """A stage exceeded its limit and was killed."""

    stage: Stage
    limit_s: float
    kind: Literal["timed_out"] = "timed_out"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Wrong:
    """The candidate does not compute attention."""

    verdict: Verdict
    kind: Literal["wrong"] = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Flaky:
    """The candidate gave different answers to the same question, or the judge could not tell."""

    verdict: Verdict
    kind: Literal["flaky"] = "flaky"


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Measured:
    """A time on a device, beside a passing verdict."""

    verdict: Verdict
    samples: Samples
    artifact: Artifact
    kind: Literal["measured"] = "measured"

    def __post_init__(self) -> None:
        _require_pass(self.verdict, "a time")

    @property
    def value_ms(self) -> float:
        return self.samples.median_ms


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Estimated:
    """A prediction, beside a passing verdict. Never a time."""

    verdict: Verdict
    estimate: Estimate
    artifact: Artifact
    kind: Literal["estimated"] = "estimated"

    def __post_init__(self) -> None:
        _require_pass(self.verdict, "an estimate")

    @property
    def value_ms(self) -> float:
        return self.estimate.value_ms


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Proof:
    """What the suite said of a finalist: it was asked `cases` drawn with `seed`, each by several judges.

    `oracles` counts the cases that each judge had something to compare in, `largest` is the greatest error over bound by output,
    `suite` the digest of the code that judged. `detail` and `counterexample` (a case as JSON) say what is wrong, if anything is.
    """

    status: Literal["passed", "wrong", "unknown"]
    where: Literal["interpreter", "device"]
    suite: str
    seed: int
    cases: int
    oracles: Mapping[str, int]
    largest: Mapping[str, float]
    detail: str = ""
    counterexample: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.status != "passed":
            return
        if not self.cases or not self.oracles.get("bound"):
            raise ValueError("a proof that compared nothing cannot pass")
        if self.detail or not all(ratio <= 1 for ratio in self.largest.values()):
            raise ValueError("a proof with an error beyond its bound cannot pass")

    @property
    def passed(self) -> bool:
        return self.status == "passed"


Outcome = Annotated[
    Pruned | CompileFailed | LaunchFailed | TimedOut | Wrong | Flaky | Measured | Estimated, Field(discriminator="kind")
]
Valued = Measured | Estimated


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Entrant:
    """One of those who raced: its times in milliseconds, one for each round until it left, and why it left (nothing if it ran to
    the end)."""

    config: Mapping[str, int | str | bool]
    times_ms: tuple[float, ...]
    left: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Race:
    """Samples of the finalists and the default, taken in turns: the times with one index belong to one round.

    `entrants` stand in the order in which they finished, the winner first. `ended` says in words what ended the race.
    """

    entrants: tuple[Entrant, ...]
    rounds: int
    ended: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Record:
    """One line of a journal: a candidate and what became of it.

    `same_code_as` names the trial whose machine code was equal, so that nothing was run again; `shared_verdict` says that
    the verdict came from a candidate that the judge cannot tell from this one. `beside` is the config whose samples were
    interleaved with its own. `attempt` counts from 1 how often the trial was made: what timed out or was killed from outside is
    tried again once, in a later run. `role` is `race` for the race of the finalists, of which the record is the winner's;
    `final` for the fresh samples taken after the choice; `shared` for samples on a problem beside its champion, of a config
    that is another problem's; `proof` for what the suite said of a finalist, whose outcome is then `Wrong` unless the `proof`
    passed.
    """

    trial: int
    problem: str
    config: Mapping[str, int | str | bool]
    outcome: Outcome
    seconds: float
    same_code_as: int | None = None
    shared_verdict: bool = False
    role: Literal["screen", "race", "final", "shared", "proof"] = "screen"
    beside: Mapping[str, int | str | bool] | None = None
    attempt: int = 1
    race: Race | None = None
    proof: Proof | None = None

    def __post_init__(self) -> None:
        if self.role == "proof" and isinstance(self.outcome, Measured | Estimated) != bool(
            self.proof and self.proof.passed
        ):
            raise ValueError("a finalist keeps its number if its proof passed, and only then")
        if (self.role == "race") != (self.race is not None):
            raise ValueError("a race is recorded with its entrants, and nothing else is")


RECORDS: TypeAdapter[Record] = TypeAdapter(Record)
OUTCOMES: TypeAdapter[Any] = TypeAdapter(Outcome)


def value_ms(outcome: Any) -> float | None:
    """The number that a record carries, in milliseconds, or None if it carries none."""
    return outcome.value_ms if isinstance(outcome, Measured | Estimated) else None


def launches_ms(outcome: Any) -> Mapping[str, float]:
    """What single launches take, in milliseconds by kernel, where that is known of several."""
    if isinstance(outcome, Measured):
        return outcome.samples.launches_ms
    return outcome.estimate.launches_ms if isinstance(outcome, Estimated) else {}


def _require_pass(verdict: Verdict, what: str) -> None:
    if not verdict.passed:
        raise ValueError(f"{what} cannot exist without a passing verdict, found `{verdict.status}`")


KILLED = "the process was killed by SIGKILL"
# How every reason begins that a death is described with; see `harness.worker.describe_exit`.
DIED = ("the process was killed by ", "the process ended with exit code ", "the device failed ")


def maybe_innocent(outcome: Any) -> bool:
    """Whether what befell a candidate may be another's doing: it took too long, or somebody killed its process."""
    return isinstance(outcome, TimedOut) or (
        isinstance(outcome, CompileFailed | LaunchFailed) and outcome.reason == KILLED
    )


def dangerous(outcome: Any) -> bool:
    """Whether a candidate took its process with it, or would not end: nobody should try it again for nothing."""
    if isinstance(outcome, TimedOut):
        return True
    return isinstance(outcome, CompileFailed | LaunchFailed) and outcome.reason.startswith(DIED)
