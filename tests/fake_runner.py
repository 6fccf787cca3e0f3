"""A device that exists only in tests: its times are a formula of the config, its failures are scripted.

It drives the whole tuner, measured mode included, without a GPU, a compiler or a child process.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from harness.compare import OutputCheck, Verdict
from harness.device import TARGETS, DeviceFacts
from harness.outcome import Artifact, Binary, Estimate, Estimated, LaunchFailed, Measured, Mode, Proof, Samples
from harness.problem import Problem
from harness.space import Config
from harness.worker import Depth, Passed


def passing_verdict(problem: Problem, where: str = "interpreter") -> Verdict:
    check = OutputCheck(
        output="out", case=problem.key, ratio=0.5, error=1e-3, bound=2e-3, index=(0, 0, 0, 0), elements=64
    )
    return Verdict(status="passed", where=where, oracle="fake", cases=(problem.key,), seed=0, checks=(check,))


def wrong_verdict(problem: Problem, where: str = "interpreter") -> Verdict:
    check = OutputCheck(
        output="out", case=problem.key, ratio=77.0, error=1e-1, bound=2e-3, index=(0, 0, 3, 5), elements=64
    )
    return Verdict(
        status="wrong", where=where, oracle="fake", cases=(problem.key,), seed=0, checks=(check,),
        detail="out: error 1.0e-01 is 77 times its bound at [0, 0, 3, 5]",
    )  # fmt: skip


def passing_proof(where: str = "interpreter") -> Proof:
    return Proof(
        status="passed",
        where=where,
        suite="fake",
        seed=0,
        cases=3,
        oracles={"bound": 3, "shadow": 1},
        largest={"out": 0.5},
    )


def wrong_proof(where: str = "interpreter") -> Proof:
    return Proof(
        status="wrong", where=where, suite="fake", seed=0, cases=2, oracles={"bound": 2}, largest={"out": 0.5},
        detail="shadow: store out of bounds", counterexample={"kernel": "fake"},
    )  # fmt: skip


def fake_artifact(config: Mapping[str, Any], *, shared_bytes: int = 1024, spill_bytes: int = 0) -> Artifact:
    code = hashlib.sha256(str(sorted(config.items())).encode()).hexdigest()[:16]
    binary = Binary(
        kernel="fake", registers=64, spill_bytes=spill_bytes, shared_bytes=shared_bytes, warps=4, instructions={}, loops=(),
        code_hash=code,
    )  # fmt: skip
    return Artifact(binaries=(binary,), toolchain="fake 1.0")


def fake_time_ms(problem: Problem, config: Mapping[str, Any]) -> float:
    """Smooth in the logarithms of the block sizes, best at 128 by 64, a little worse with fewer warps."""
    blocks = [value for name, value in config.items() if "block" in name]
    distance = sum((np.log2(block) - np.log2(want)) ** 2 for block, want in zip(blocks, (128, 64) * 4, strict=False))
    warps = sum(0.02 * abs(int(value) - 8) for name, value in config.items() if "warps" in name)
    return float(1 + 0.1 * distance + warps) * max(problem.flops, 1) / 1e12


class FakeRunner:
    """Implements `harness.worker.Runner`. `scripts` maps a stage to a function of the config that may give an outcome."""

    def __init__(
        self,
        mode: Mode = "measured",
        *,
        device: DeviceFacts | None = None,
        noise: float = 0.0,
        seed: int = 0,
        scripts: Mapping[str, Callable[[Problem, Config], Any]] | None = None,
    ) -> None:
        self.mode: Mode = mode
        self.device = device or TARGETS["h200"]
        self.noise = noise
        self.scripts = dict(scripts or {})
        self.calls: Counter[str] = Counter()
        self.closed = False
        self._rng = np.random.default_rng(seed)

    def compile(self, problem: Problem, config: Config) -> Callable[[], Any]:
        self.calls["compile"] += 1
        return lambda: self._scripted("compile", problem, config) or fake_artifact(config)

    def verify(self, problem: Problem, config: Config) -> Callable[[], Any]:
        self.calls["verify"] += 1
        where = "device" if self.mode == "measured" else "interpreter"
        return lambda: self._scripted("verify", problem, config) or passing_verdict(problem, where)

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Any]:
        self.calls[f"value {depth}"] += 1

        def number() -> Measured | Estimated | LaunchFailed:
            scripted = self._scripted("value", problem, config)
            if scripted is not None:
                return scripted
            if self.mode == "estimated":
                estimate = Estimate(value_ms=fake_time_ms(problem, config), terms={}, model="fake")
                return Estimated(verdict=passed.verdict, estimate=estimate, artifact=passed.artifact)
            beside = () if incumbent is None else self._times(problem, incumbent)
            samples = Samples(times_ms=self._times(problem, config), incumbent_ms=beside, method="fake")
            return Measured(verdict=passed.verdict, samples=samples, artifact=passed.artifact)

        return number

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Any]:
        self.calls["race"] += 1

        def raced() -> Any:
            scripted = self._scripted("race", problem, entrants)
            if scripted is not None:
                return scripted
            shared = [tuple(np.resize(self._times(problem, each), rounds)) for each in entrants]
            return tuple(Samples(times_ms=times, method="fake") for times in shared)

        return raced

    def prove(self, problem: Problem, config: Config) -> Callable[[], Any]:
        self.calls["prove"] += 1
        where = "device" if self.mode == "measured" else "interpreter"
        return lambda: self._scripted("prove", problem, config) or passing_proof(where)

    def close(self) -> None:
        self.closed = True

    def _times(self, problem: Problem, config: Mapping[str, Any]) -> tuple[float, ...]:
        noise = 1 + self.noise * self._rng.standard_normal(31)
        return tuple(fake_time_ms(problem, config) * noise)

    def _scripted(self, stage: str, problem: Problem, config: Any) -> Any:
        script = self.scripts.get(stage)
        return script(problem, config) if script else None
