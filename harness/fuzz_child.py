"""The half of the fuzzer that runs the kernel: hypothesis, in a process of its own with Triton interpreting.

It reads a plan from standard input and writes one JSON line an event to standard output: `case` before a case is run, so
that the parent knows what a crash was about, `judged` after it, and `found` for a shrunk counterexample. Refuses to catch
what is not about the case.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import hypothesis
import numpy as np
import pydantic
from hypothesis import HealthCheck, Phase
from torch import Tensor
from triton.runtime.errors import InterpreterError

from harness.bounds import RoundingContract
from harness.cases import CASES, Case, case_strategy
from harness.errors import RefusedError
from harness.judges import JUDGES, Finding, applicable
from harness.problem import Dtype, Pass, Problem
from harness.space import Config
from harness.subject import Answer, KernelSubject, Subject
from harness.workspace import Workspace

# Examples between two looks at the clock, and properties drawn for a case beside the bound.
ROUND = 20
PROPERTIES_PER_CASE = 2


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to fuzz. `configs` by dtype; stops after `seconds` or `cases`, whichever is first; `only` replays one case."""

    root: Path
    kernel: str
    pass_: Pass
    configs: dict[Dtype, list[dict[str, int | str | bool]]]
    seed: int
    seconds: float
    cases: int
    only: Case | None = None


PLANS: pydantic.TypeAdapter[Plan] = pydantic.TypeAdapter(Plan)


class FalsifiedError(Exception):
    """Hypothesis shrinks what raises this."""

    def __init__(self, case: Case, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.case = case
        self.finding = finding


# What a kernel file may raise, on the host or in the interpreter. What is none of these ends the process, which is a finding.
_RAISED = (
    InterpreterError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


class SubjectError(Exception):
    """What a kernel, or the interpreter on its behalf, raised half-way through a case."""


@dataclass(frozen=True, slots=True)
class Careful:
    """A subject whose exceptions are told apart from those of the judges: only the former are findings."""

    subject: KernelSubject

    @property
    def name(self) -> str:
        return self.subject.name

    def refuses(self, problem: Problem) -> str | None:
        return self.subject.refuses(problem)

    def contract(self, problem: Problem) -> RoundingContract:
        return self.subject.contract(problem)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        try:
            return self.subject.run(problem, inputs)
        except RefusedError:
            raise
        except _RAISED as raised:
            cause = raised.__cause__ or raised
            said = str(cause).strip().splitlines()
            raise SubjectError(f"{type(cause).__name__}: {said[0] if said else ''} in `{problem}`") from raised


class Fuzzer:
    """Judges cases of one kernel and reports each as an event."""

    def __init__(self, plan: Plan, events: TextIO) -> None:
        self._plan = plan
        self._events = events
        self._kernel = Workspace(plan.root).load_kernel(plan.kernel)
        self.count = 0

    def run(self) -> None:
        """Fuzz until the plan is fulfilled or a counterexample is found."""
        if self._plan.only is not None:
            self._judge_all(self._plan.only)
            return
        configs = {dtype: [Config(values) for values in several] for dtype, several in self._plan.configs.items()}
        strategy = case_strategy(self._plan.kernel, self._plan.pass_, configs)
        started = time.monotonic()
        turn = 0
        while time.monotonic() - started < self._plan.seconds and self.count < self._plan.cases:
            if not self._round(strategy, self._plan.seed * 1_000_003 + turn):
                return
            turn += 1

    def _round(self, strategy: "hypothesis.strategies.SearchStrategy[Case]", seed: int) -> bool:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=min(ROUND, self._plan.cases - self.count),
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.target, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(strategy)
        def holds(case: Case) -> None:
            self._judge(case)

        try:
            holds()
        except FalsifiedError as falsified:
            self._say(
                "found", case=_plain(falsified.case), judge=falsified.finding.judge, detail=falsified.finding.detail
            )
            return False
        return True

    def _judge(self, case: Case) -> None:
        subject = Careful(KernelSubject(kernel=self._kernel, config=case.config))
        rng = np.random.default_rng(int(case.id, 16))
        possible = applicable(subject, case)
        drawn = [str(name) for name in rng.permutation(possible)[:PROPERTIES_PER_CASE]] if possible else []
        self._say("case", case=_plain(case))
        ratios: dict[str, float] = {}
        asked = []
        for name in ("bound", *drawn):
            finding, checks = self._ask(subject, case, name)
            if checks or finding:
                asked.append(name)
            if finding is not None:
                self._say("judged", verdict="wrong", judges=asked, ratios=ratios)
                raise FalsifiedError(case, finding)
            if name == "bound":
                ratios = {check.output: check.ratio for check in checks}
        for output, ratio in ratios.items():
            hypothesis.target(ratio, label=output)
        self.count += 1
        self._say("judged", verdict="passed" if asked else "nothing to compare", judges=asked, ratios=ratios)

    def _ask(self, subject: Subject, case: Case, name: str) -> tuple[Finding | None, Any]:
        try:
            return JUDGES[name].find(subject, case)
        except RefusedError:
            return None, ()
        except SubjectError as raised:
            return Finding("exception", str(raised)), ()

    def _judge_all(self, case: Case) -> None:
        """Every judge that can say something about one case, for a replay."""
        subject = Careful(KernelSubject(kernel=self._kernel, config=case.config))
        self._say("case", case=_plain(case))
        for name in ("bound", "repeat", *applicable(subject, case)):
            finding, checks = self._ask(subject, case, name)
            worst = max((check.ratio for check in checks), default=None)
            self._say("asked", judge=name, detail=finding.detail if finding else "", worst=worst, checks=len(checks))

    def _say(self, event: str, **values: Any) -> None:
        self._events.write(json.dumps({"event": event, **values}) + "\n")
        self._events.flush()


def _plain(case: Case) -> Any:
    return json.loads(CASES.dump_json(case))


def main() -> None:
    """Run the plan on standard input."""
    # What kernels and compilers print must not mix with the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Fuzzer(PLANS.validate_json(sys.stdin.buffer.read()), events).run()


if __name__ == "__main__":
    main()
