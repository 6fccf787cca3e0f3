"""The half of the fuzzer that runs the kernel: hypothesis, in a process of its own with Triton interpreting.

It reads a plan from standard input and writes one JSON line an event to standard output: `case` before a case is run, so
that the parent knows what a crash was about, `judged` after it, `found` for a shrunk counterexample, and `refused` where the
plan cannot be carried out. Refuses to catch what is not about the case.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import hypothesis
import numpy as np
import pydantic

from harness import suite
from harness.cases import CASES, Case, case_strategy, foreign_strategy, kernel_subject, like
from harness.errors import UsageError
from harness.foreign import Foreign, load
from harness.judges import Finding, applicable
from harness.problem import Dtype, Pass
from harness.quicken import quicken
from harness.shrink import shrink
from harness.space import Config
from harness.subject import Subject
from harness.worker import DEVICE_LOST, device_answers
from harness.workspace import Workspace


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to fuzz: a kernel file of the workspace `root` under `configs` by dtype, with problems of which `variants` are drawn
    beside plain attention, or a `foreign` implementation.

    Stops after `seconds` or `cases`, whichever is first; `only` replays these cases. `profile` says how many judges are asked
    about a case, and what hypothesis does beside drawing. On the device "cuda" kernels are compiled, else interpreted.
    `sanitize` names a tool of compute-sanitizer that watches the process, see `harness.sanitizer`.
    """

    seed: int
    seconds: float
    cases: int
    profile: str = "nightly"
    device: Literal["cpu", "cuda"] = "cpu"
    root: Path | None = None
    kernel: str = ""
    pass_: Pass = "fwd"
    variants: tuple[str, ...] = ()
    configs: dict[Dtype, list[dict[str, int | str | bool]]] = pydantic.Field(default_factory=dict)
    foreign: Foreign | None = None
    only: tuple[Case, ...] = ()
    sanitize: str = ""


PLANS: pydantic.TypeAdapter[Plan] = pydantic.TypeAdapter(Plan)


class FalsifiedError(Exception):
    """Hypothesis shrinks what raises this."""

    def __init__(self, case: Case, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.case = case
        self.finding = finding


class Fuzzer:
    """Judges cases of one subject and reports each as an event."""

    def __init__(self, plan: Plan, events: TextIO) -> None:
        self._plan = plan
        self._events = events
        self._profile = suite.profile_for(plan.profile)
        self._foreign = None if plan.foreign is None else load(plan.foreign, device=plan.device)
        self._kernel = Workspace(plan.root).load_kernel(plan.kernel) if plan.root else None
        self._configs = {dtype: [Config(values) for values in several] for dtype, several in plan.configs.items()}
        # While a case is shrunk, only the judge that objected is asked: another one's objection is another matter.
        self._objected = ""
        self._first: FalsifiedError | None = None
        self.count = 0

    def run(self) -> None:
        """Fuzz until the plan is fulfilled or a counterexample is found."""
        for case in self._plan.only:
            self._judge_all(case)
        if self._plan.only:
            return
        started = time.monotonic()
        turn = 0
        while time.monotonic() - started < self._plan.seconds and self.count < self._plan.cases:
            seed = suite.seed_of(self._plan.seed, turn)
            if not self._round(self._strategy(seed), seed):
                return
            turn += 1

    def _strategy(self, seed: int) -> "hypothesis.strategies.SearchStrategy[Case]":
        if self._foreign is not None and self._plan.foreign is not None:
            able = self._foreign.support.abilities
            return foreign_strategy(
                self._plan.foreign,
                [name for name in get_args(Pass) if name in able],
                [name for name in get_args(Dtype) if name in able],
                self._foreign.nearest,
            )
        if self._plan.device == "cpu":
            return case_strategy(self._plan.kernel, self._plan.pass_, self._configs, variants=self._plan.variants)
        # Compiling takes longer than running, so the cases of a round share what is compiled in: config, head dims, mask.
        rng = np.random.default_rng(seed)
        dtype = sorted(self._configs)[int(rng.integers(len(self._configs)))]
        config = self._configs[dtype][int(rng.integers(len(self._configs[dtype])))]
        drawn = case_strategy(self._plan.kernel, self._plan.pass_, {dtype: [config]}, variants=self._plan.variants)
        family = suite.fixed_cases(drawn, 8, seed)[-1]
        return case_strategy(self._plan.kernel, self._plan.pass_, {dtype: [config]}, shape=like(family.asked))

    def _round(self, strategy: "hypothesis.strategies.SearchStrategy[Case]", seed: int) -> bool:
        @hypothesis.seed(seed)
        @suite.settings_for(self._profile, min(suite.ROUND, self._plan.cases - self.count))
        @hypothesis.given(strategy)
        def holds(case: Case) -> None:
            self._judge(case)

        try:
            holds()
        except FalsifiedError as falsified:
            self._report(falsified)
            return False
        except hypothesis.errors.Flaky:
            assert self._first is not None
            finding = Finding("flaky", f"wrong once, right when asked again: {self._first.finding.detail}")
            self._say("found", case=_plain(self._first.case), judge=finding.judge, detail=finding.detail)
            return False
        return True

    def _report(self, falsified: FalsifiedError) -> None:
        finding = falsified.finding

        def fails(case: Case) -> bool:
            nonlocal finding
            found = self._objection(case)
            finding = found or finding
            return found is not None

        case = falsified.case
        if self._profile.shrink:
            case = shrink(case, self._configs, fails)
        self._say("found", case=_plain(case), judge=finding.judge, detail=finding.detail)

    def _objection(self, case: Case) -> Finding | None:
        """What the judge that objected says of another case."""
        self._say("case", case=_plain(case))
        subject = self._subject(case)
        if self._objected not in applicable(subject, case):
            return None
        return next((finding for _, finding, _ in suite.ask_each(subject, case, [self._objected])), None)

    def _subject(self, case: Case) -> Subject:
        if self._foreign is not None:
            return self._foreign
        kernel: Any = self._kernel
        return kernel_subject(kernel, case, device=self._plan.device)

    def _judge(self, case: Case) -> None:
        subject = self._subject(case)
        self._say("case", case=_plain(case))
        ratios: dict[str, float] = {}
        asked = []
        names = [self._objected] if self._objected else suite.judges_for(subject, case, self._profile.judges)
        for name, finding, checks in suite.ask_each(subject, case, names):
            if checks or finding:
                asked.append(name)
            if finding is not None:
                self._give_up_a_lost_device(finding)
                falsified = FalsifiedError(case, finding)
                if self._first is None:
                    self._objected, self._first = name, falsified
                    self._say("judged", verdict="wrong", judges=asked, ratios=ratios)
                raise falsified
            if name == "bound":
                ratios = {check.output: check.ratio for check in checks}
        for output, ratio in ratios.items() if self._profile.target else ():
            hypothesis.target(ratio, label=output)
        self.count += 1
        self._say("judged", verdict="passed" if asked else "nothing to compare", judges=asked, ratios=ratios)

    def _judge_all(self, case: Case) -> None:
        """Every judge that can say something about one case, for a replay."""
        subject = self._subject(case)
        self._say("case", case=_plain(case))
        for name, finding, checks in suite.ask_each(subject, case, applicable(subject, case)):
            worst = max((check.ratio for check in checks), default=None)
            detail = finding.detail if finding else ""
            self._say("asked", case=case.id, judge=name, detail=detail, worst=worst, checks=len(checks))

    def _give_up_a_lost_device(self, finding: Finding) -> None:
        """An error of the device sticks to the process: every later question would be answered with it."""
        if finding.judge == "exception" and self._plan.device == "cuda" and not device_answers():
            os.write(2, f"{finding.detail}\n".encode())
            os._exit(DEVICE_LOST)

    def _say(self, event: str, **values: Any) -> None:
        self._events.write(json.dumps({"event": event, **values}) + "\n")
        self._events.flush()


def _plain(case: Case) -> Any:
    return json.loads(CASES.dump_json(case))


def main() -> None:
    """Run the plan on standard input."""
    quicken()
    # What kernels and compilers print must not mix with the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        Fuzzer(PLANS.validate_json(sys.stdin.buffer.read()), events).run()
    except UsageError as error:
        events.write(json.dumps({"event": "refused", "message": error.message, "hint": error.hint}) + "\n")
        events.flush()


if __name__ == "__main__":
    main()
