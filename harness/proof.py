"""The proof of a finalist: the suite, asked about one config and problems like the one it was tuned for.

A candidate passes a gate before it has a number; it must pass this before it becomes a champion. Refuses to shrink: a finalist
that is wrong is dropped, and its case is kept for `flashtune replay`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from harness import suite
from harness.cases import CASES, Case, case_strategy, kernel_subject, like
from harness.judges import JUDGES, applicable
from harness.outcome import Proof
from harness.problem import Problem
from harness.space import Config, Value
from harness.subject import Kernel, Subject

# The cost of a proof is that of a few gates; `flashtune fuzz` asks thousands.
CASES_PER_FINALIST = 12
JUDGES_PER_CASE = 4


def prove(
    kernel: Kernel,
    stem: str,
    problem: Problem,
    config: Mapping[str, Value],
    *,
    seed: int,
    device: str = "cpu",
) -> Proof:
    """Ask the suite about `kernel` under `config`, in problems like `problem`, until the first objection or to the end.

    The judges of each case are the suite's choice, and every judge is asked about at least one case in which it has something
    to compare, if there is one.
    """
    where: Literal["interpreter", "device"] = "interpreter" if device == "cpu" else "device"
    strategy = case_strategy(stem, problem.pass_, {problem.dtype: [Config(config)]}, shape=like(problem))
    cases = suite.fixed_cases(strategy, CASES_PER_FINALIST, seed)
    subjects = [kernel_subject(kernel, case, device=device) for case in cases]
    oracles: Counter[str] = Counter()
    largest: dict[str, float] = {}
    for position, name in _questions(subjects, cases, oracles):
        case = cases[position]
        for _, finding, checks in suite.ask_each(subjects[position], case, [name]):
            oracles[name] += bool(checks or finding)
            if finding is not None:
                return Proof(
                    status="wrong", where=where, suite=suite.suite_digest(), seed=seed, cases=position + 1, oracles=+oracles,
                    largest=largest, detail=f"{finding.judge}: {finding.detail}",
                    counterexample=json.loads(CASES.dump_json(case)),
                )  # fmt: skip
            if name == "bound":
                for check in checks:
                    largest[check.output] = max(largest.get(check.output, 0.0), check.ratio)
    return Proof(
        status="passed" if oracles["bound"] else "unknown", where=where, suite=suite.suite_digest(), seed=seed,
        cases=len(cases), oracles=dict(sorted((+oracles).items())), largest=dict(sorted(largest.items())),
        detail="" if oracles["bound"] else "the kernel refused every case",
    )  # fmt: skip


def _questions(
    subjects: Sequence[Subject], cases: Sequence[Case], oracles: Mapping[str, int]
) -> Iterator[tuple[int, str]]:
    """Cases by position and who is asked about them; at last the judges that have compared nothing so far."""
    for position, (subject, case) in enumerate(zip(subjects, cases, strict=True)):
        for name in suite.judges_for(subject, case, JUDGES_PER_CASE):
            yield position, name
    for name in JUDGES:
        for position, (subject, case) in enumerate(zip(subjects, cases, strict=True)):
            if oracles[name]:
                break
            if name in applicable(subject, case):
                yield position, name
