"""The children of a campaign, without children and without a device: everything they would answer is a formula or a script."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from harness import beside, ceilings, truth
from harness.beside import Pair
from harness.ceilings import Ceiling
from harness.compare import OutputCheck
from harness.compile import compile_candidate
from harness.device import TARGETS, DeviceFacts
from harness.estimates import estimate_all
from harness.outcome import LaunchFailed
from harness.truth import Answer, Reply
from tests.fake_runner import FakeRunner, fake_artifact, fake_time_ms

# How much longer each rival takes than ours.
SLOWER = {
    "sdpa:flash": 0.9,
    "sdpa:cudnn": 0.8,
    "sdpa:efficient": 2.0,
    "sdpa:math": 11.0,
    "fa3": 0.7,
    "flex": 1.3,
    "flex:tuned": 1.15,
}


def reply(ratio: float = 0.5, **changed: Any) -> Reply:
    check = OutputCheck(output="out", case="c", ratio=ratio, error=ratio, bound=1.0, index=(0, 0, 3, 5), elements=64)
    values: dict[str, Any] = {
        "checks": (check,), "faults": (), "runs": truth.RUNS, "differing": "", "answer": Answer(given="g", outputs={}),
    }  # fmt: skip
    return Reply(**values | changed)


class FakeChildren(FakeRunner):
    """`FakeRunner`, and calls of functions: `answers` maps a function's name to what is given instead, from its arguments."""

    def __init__(self, device: DeviceFacts | None = None, answers: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__("measured", device=device or TARGETS["h200"], noise=0.01)
        self.answers = dict(answers or {})
        self.left: Callable[[], float] = lambda: 0.0
        self.asked: Counter[str] = Counter()
        self.stem = ""

    def for_kernel(self, stem: str) -> "FakeChildren":
        self.stem = stem
        return self

    def call(self, pool: str, stage: str, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        name = function.__name__
        self.asked[f"{pool} {name}"] += 1
        given = self.answers[name](*arguments) if name in self.answers else self._known(function, arguments)
        return lambda: given

    def _known(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function is compile_candidate:
            return fake_artifact(arguments[1])
        if function is truth.ask:
            case, device, runs, *other = arguments
            if device == "cpu":
                return reply(0.25, runs=runs)
            return reply(against=reply(0.75).checks if other and other[0] is not None else ())
        if function is ceilings.ceilings:
            return (
                Ceiling(what="copy TB/s", size="4096 MiB", rate=4.1, interval=(4.0, 4.2), times_ms=(2.0,) * 20),
                Ceiling(
                    what="bf16 TFLOP/s", size="8192 x 8192 x 8192", rate=1000.0, interval=(990.0, 1010.0), times_ms=(1.1,) * 20,
                ),
            )  # fmt: skip
        if function is beside.pair:
            problem, config, rival, _, seed = arguments
            ours = fake_time_ms(problem, config)
            other = isinstance(rival, beside.Other)
            theirs = (
                ours * (SLOWER["flex:tuned"] if other else SLOWER[rival]) if other or isinstance(rival, str) else None
            )
            theirs = theirs or fake_time_ms(problem, rival)
            noise = 1 + 0.002 * np.random.default_rng(seed).standard_normal((2, 40))
            return Pair(
                rival_ms=tuple(theirs * noise[0]), ours_ms=tuple(ours * noise[1]), method="graph of 1", throttled=False,
                rival_bytes=(3 if rival == "sdpa:math" else 1) << 30, ours_bytes=1 << 29,
            )  # fmt: skip
        if function is estimate_all:
            problem, _, candidates = arguments
            return [2.0 * fake_time_ms(problem, config) for config, _ in candidates]
        if function is truth.device_name:
            return "a fake"
        raise AssertionError(f"nobody answers {function}")


def failed(reason: str, stage: Any = "verify") -> LaunchFailed:
    return LaunchFailed(stage=stage, reason=reason)
