"""A device that is simulated: kernels of known cost, noise, a drifting clock; and a runner that has a whole tune happen on it.

The code that measures, races and chooses is the tuner's own; only the device, its clock and the compilers are made up. So what a
selection is worth can be known, because here the truth is. Refuses to leave a trace: its journals are gone when it ends, and no
champion comes of it.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness import measure
from harness.compare import OutputCheck, Verdict
from harness.device import TARGETS, DeviceFacts
from harness.outcome import Artifact, Binary, CompileFailed, Measured, Mode, Proof, Samples
from harness.problem import Problem
from harness.space import Config
from harness.worker import Depth, Passed

Noise = Callable[[np.random.Generator], float]


def quiet(rng: np.random.Generator) -> float:
    """No noise at all."""
    del rng
    return 1.0


def normal(sigma: float) -> Noise:
    """Multiplicative normal noise with relative standard deviation `sigma`."""
    return lambda rng: 1.0 + sigma * float(rng.standard_normal())


@dataclass
class SimulatedDevice:
    """A device on which kernels of known cost run, and the timer that `harness.measure` wants of it. A launch takes its kernel's
    milliseconds times noise, times what the drifting clock makes of it; the wall clock moves on with every launch and flush.

    `drift` is the slow-down of all kernels after one second of wall time: 0.2 makes everything 20 % slower by then; or a
    function that gives, for seconds of wall time, how many times longer everything takes.
    `flush_ms` is wall time. `fail_at` raises `RuntimeError` in the launch with that number; `readings` replaces what
    the timer says of a launch with that number; `throttled_at` are launches during which the device throttles.
    """

    rng: np.random.Generator
    noise: Noise = quiet
    drift: float | Callable[[float], float] = 0.0
    flush_ms: float = 0.0
    base_clock_mhz: int | None = 1800
    fail_at: int | None = None
    readings: dict[int, float] = field(default_factory=dict)
    throttled_at: tuple[int, ...] = ()
    wall_ms: float = 0.0
    log: list[str] = field(default_factory=list)
    launches: int = 0
    busy_ms: float = 0.0

    def kernel(self, name: str, cost_ms: float) -> Callable[[], None]:
        """A callable that launches a kernel called `name`, and logs it."""

        def run() -> None:
            if self.launches == self.fail_at:
                raise RuntimeError(f"launch {self.launches} of {name} failed")
            elapsed = cost_ms * self._slower() * self.noise(self.rng)
            self.launches += 1
            self.busy_ms += elapsed
            self.wall_ms += elapsed
            self.log.append(name)

        return run

    def now_ms(self) -> float:
        return self.wall_ms

    def time_ms(self, run: Callable[[], None]) -> float:
        before, number = self.busy_ms, self.launches
        run()
        return self.readings.get(number, self.busy_ms - before)

    def capture(self, run: Callable[[], None], copies: int) -> Callable[[], None]:
        self.log.append(f"capture {copies}")

        def replay() -> None:
            for _ in range(copies):
                run()

        return replay

    def flush(self) -> None:
        self.wall_ms += self.flush_ms
        self.log.append("flush")

    def clock_mhz(self) -> int | None:
        if self.base_clock_mhz is None:
            return None
        return round(self.base_clock_mhz / self._slower())

    def slowed(self) -> tuple[str, ...]:
        return ("power cap",) if self.launches - 1 in self.throttled_at else ()

    def heat(self) -> tuple[int | None, float | None]:
        return None, None

    def _slower(self) -> float:
        seconds = self.wall_ms / 1e3
        return self.drift(seconds) if callable(self.drift) else 1.0 + self.drift * seconds


@dataclass(kw_only=True)
class SimulatedRunner:
    """Implements `harness.worker.Runner` on a simulated device. `costs_ms` are the true times; None is a config that does not
    compile. Seconds of compiling and milliseconds of judging pass on the device's own clock; `jobs` compile at a time.

    `device_ms` adds up how long the device was asked for, judging and flushing included.
    """

    costs_ms: Mapping[Config, float | None]
    simulated: "SimulatedDevice"
    compile_s: Callable[[Config], float] = lambda config: 0.0
    verify_ms: float = 0.0
    jobs: int = 16
    policies: Mapping[measure.Depth, measure.Policy] = field(default_factory=lambda: measure.POLICIES)
    mode: Mode = "measured"
    device: DeviceFacts = field(default_factory=lambda: TARGETS["h200"])
    device_ms: float = 0.0
    _free_ms: list[float] = field(default_factory=list)

    def now_s(self) -> float:
        """The simulated clock, in seconds."""
        return self.simulated.wall_ms / 1e3

    def compile(self, problem: Problem, config: Config) -> Callable[[], Any]:
        while len(self._free_ms) < self.jobs:
            heapq.heappush(self._free_ms, 0.0)
        ready_ms = max(heapq.heappop(self._free_ms), self.simulated.wall_ms) + 1e3 * self.compile_s(config)
        heapq.heappush(self._free_ms, ready_ms)

        def wait() -> Artifact | CompileFailed:
            self.simulated.wall_ms = max(self.simulated.wall_ms, ready_ms)
            if self.costs_ms[config] is None:
                return CompileFailed(reason="simulated")
            return artifact_of(config, "simulated")

        return wait

    def verify(self, problem: Problem, config: Config) -> Callable[[], Verdict]:
        def wait() -> Verdict:
            self.simulated.wall_ms += self.verify_ms
            self.device_ms += self.verify_ms
            return verdict_of(problem, "simulated")

        return wait

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Measured]:
        def wait() -> Measured:
            began = self.simulated.wall_ms
            samples = measure.measure(
                self._kernel(config),
                timer=self.simulated,
                policy=self.policies[depth],
                rng=self.simulated.rng,
                incumbent=None if incumbent is None else self._kernel(incumbent),
                now_ms=self.simulated.now_ms,
            )
            self.device_ms += self.simulated.wall_ms - began
            return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)

        return wait

    def race(
        self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int
    ) -> Callable[[], tuple[Samples, ...]]:
        def wait() -> tuple[Samples, ...]:
            began, device = self.simulated.wall_ms, self.simulated
            runs = [self._kernel(config) for config in entrants]
            policy = self.policies["race"]
            found = measure.race(runs, timer=device, policy=policy, rng=device.rng, rounds=rounds, now_ms=device.now_ms)
            self.device_ms += device.wall_ms - began
            return found

        return wait

    def prove(self, problem: Problem, config: Config) -> Callable[[], Proof]:
        return lambda: Proof(
            status="passed",
            where="device",
            suite="simulated",
            seed=0,
            cases=1,
            oracles={"bound": 1},
            largest={"out": 0.5},
        )

    def close(self) -> None:
        """There is nothing to close."""

    def _kernel(self, config: Config) -> Callable[[], None]:
        cost = self.costs_ms[config]
        return self.simulated.kernel(str(config), math.nan if cost is None else cost)


def artifact_of(config: Config, source: str) -> Artifact:
    """A binary that nothing is known of, from `source`."""
    binary = Binary(
        kernel=source, registers=64, spill_bytes=0, shared_bytes=1024, warps=4, instructions={}, loops=(),
        code_hash=str(config),
    )  # fmt: skip
    return Artifact(binaries=(binary,), toolchain=source)


def verdict_of(problem: Problem, source: str) -> Verdict:
    """What stands for a judgment where nothing is computed, by `source`."""
    check = OutputCheck(output="out", case=problem.key, ratio=0.5, error=0.5, bound=1.0, index=(0, 0, 0, 0), elements=1)
    return Verdict(status="passed", where="device", oracle=source, cases=(problem.key,), seed=0, checks=(check,))
