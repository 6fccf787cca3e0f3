"""A recorded space as a device: a runner that answers a whole tune with what was recorded, failures and costs included.

Compile and run cost pass on a clock of its own, so that an hour of tuning can be looked at in a second; `pace` has it pass in
real time too. Refuses to time what has no recorded time, and to judge: whatever ran there counts as passed.
"""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.compare import Verdict
from harness.device import TARGETS, DeviceFacts
from harness.errors import UsageError
from harness.landscape import Landscape, Recording, read_landscapes
from harness.outcome import (
    CompileFailed,
    LaunchFailed,
    Measured,
    Mode,
    Proof,
    Pruned,
    Samples,
    TimedOut,
)  # fmt: skip
from harness.problem import Problem, parse_problem
from harness.replay import Noise, exactly
from harness.simulated import artifact_of, verdict_of
from harness.space import Config
from harness.worker import Depth, Passed

# What a tune of a space is called whose file names no problem of ours.
STAND_IN = parse_problem("b1 h1 s64 d32 fp16")
# Samples of one measurement.
_COUNTS: dict[Depth, int] = {"screen": 10, "final": 30}
# Where a file says nothing of cost, what a trial takes on a device: some samples and what surrounds them.
_LEAST_RUN_S = 0.05


@dataclass(kw_only=True)
class ReplayRunner:
    """Implements `harness.worker.Runner` on a landscape; `jobs` configs compile at a time, one runs.

    `noise` gives one sample of a recording (`exactly`, `resampled`). `pace` is real seconds for a recorded second: 0 has the
    clock alone go on. `busy_s` adds up how long the device worked.
    """

    land: Landscape
    noise: Noise = exactly
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    jobs: int = 16
    pace: float = 0.0
    device: DeviceFacts = field(default_factory=lambda: TARGETS["h200"])
    mode: Mode = "measured"
    clock_s: float = 0.0
    busy_s: float = 0.0
    _free_s: list[float] = field(default_factory=list)

    def now_s(self) -> float:
        """The simulated clock, in seconds."""
        return self.clock_s

    def compile(self, problem: Problem, config: Config) -> Callable[[], Any]:
        while len(self._free_s) < self.jobs:
            heapq.heappush(self._free_s, 0.0)
        found = self._recording(config)
        ready_s = max(heapq.heappop(self._free_s), self.clock_s) + found.compile_s
        heapq.heappush(self._free_s, ready_s)

        def wait() -> Any:
            time.sleep(found.compile_s * self.pace)
            self.clock_s = max(self.clock_s, ready_s)
            refused = _refused(found)
            return refused if isinstance(refused, CompileFailed | Pruned) else artifact_of(config, "recorded")

        return wait

    def verify(self, problem: Problem, config: Config) -> Callable[[], Verdict]:
        return lambda: verdict_of(problem, "recorded")

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Any]:
        def wait() -> Any:
            found = self._recording(config)
            self._work(found.run_s or _LEAST_RUN_S)
            refused = _refused(found)
            if refused is not None:
                return refused
            count = _COUNTS[depth]
            beside = () if incumbent is None else self._times(incumbent, count)
            samples = Samples(times_ms=self._times(config, count), incumbent_ms=beside, method="replay")
            return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)

        return wait

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Any]:
        def wait() -> tuple[Samples, ...]:
            found = tuple(Samples(times_ms=self._times(each, rounds), method="replay") for each in entrants)
            self._work(sum(sum(one.times_ms) for one in found) / 1e3)
            return found

        return wait

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proof]:
        return lambda: Proof(
            status="passed", where="device", suite="replay", seed=0, cases=1, oracles={"bound": 1}, largest={"out": 0.5}
        )

    def close(self) -> None:
        """There is nothing to close."""

    def _recording(self, config: Config) -> Recording:
        found = self.land.recordings.get(config)
        if found is None:
            raise UsageError(f"the config `{config}` was not recorded in {self.land.name}")
        return found

    def _times(self, config: Config, count: int) -> tuple[float, ...]:
        found = self._recording(config)
        drawn = (self.noise(found, self.rng) for _ in range(count))
        return tuple(one for one in drawn if one is not None)

    def _work(self, seconds: float) -> None:
        time.sleep(seconds * self.pace)
        self.clock_s += seconds
        self.busy_s += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlace:
    """What makes a `ReplayRunner` wherever it is called, in whatever process: of the first landscape in the file at `path`.

    `device` is the model that is played, one of the named targets or any other word.
    """

    path: Path
    device: str = "h200"
    pace: float = 0.0

    def __call__(self) -> ReplayRunner:
        return ReplayRunner(land=read_landscapes(self.path)[0], device=facts_of(self.device), pace=self.pace)


def facts_of(name: str) -> DeviceFacts:
    """The facts of a model that is played: those of the target of that name, else of some target under that name."""
    return TARGETS.get(name) or replace(TARGETS["h200"], name=name)


def default_of(land: Landscape) -> Config:
    """A config of a landscape to begin with, where its file names none: the first one that ran."""
    return next(config for config, found in land.recordings.items() if found.time_ms is not None)


def _refused(found: Recording) -> CompileFailed | Pruned | LaunchFailed | TimedOut | None:
    """What became of a config that has no time, in our words."""
    if found.time_ms is not None:
        return None
    words = found.failure.lower()
    if "compil" in words:
        return CompileFailed(reason=f"recorded: {found.failure}")
    if "constraint" in words or "invalid" in words:
        return Pruned(rule="recorded", detail=found.failure)
    if "timeout" in words or "timed" in words:
        return TimedOut(stage="measure", limit_s=found.run_s)
    stage = "verify" if "correct" in words or "wrong" in words else "measure"
    return LaunchFailed(stage=stage, reason=f"recorded: {found.failure}")  # type: ignore[arg-type]
