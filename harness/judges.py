"""Every oracle of the proof behind one interface: a named judge asks a subject about a case and says what it found.

Refuses to choose cases, and to catch what a subject raises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness import bounds, compare
from harness.cases import Case, structured, tensors_of
from harness.compare import OutputCheck
from harness.properties import PROPERTIES
from harness.subject import Subject


@dataclass(frozen=True, slots=True)
class Finding:
    """What one judge found wrong with one case, in words."""

    judge: str
    detail: str


@dataclass(frozen=True, slots=True)
class Judge:
    """An oracle. `ask` returns the checks it made (none: it had nothing to compare) and faults in words."""

    name: str
    why: str
    ask: Callable[[Subject, Case], tuple[tuple[OutputCheck, ...], tuple[str, ...]]]

    def find(self, subject: Subject, case: Case) -> tuple[Finding | None, tuple[OutputCheck, ...]]:
        """None if it found nothing wrong, and the checks behind that."""
        checks, faults = self.ask(subject, case)
        failed = [check for check in checks if not check.ratio <= 1]
        reasons = [compare.sentence(compare.worst(failed))] if failed else []
        detail = "; ".join([*reasons, *faults[:3]])
        return (Finding(self.name, detail) if detail else None), checks


def _bound(subject: Subject, case: Case) -> tuple[tuple[OutputCheck, ...], tuple[str, ...]]:
    problem, given = case.asked, tensors_of(case)
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, given, subject.contract(problem), structured=structured(case))
    answer = subject.run(problem, given)
    return compare.judge(answer.outputs, expected, case=case.problem), answer.faults


def _repeat(subject: Subject, case: Case) -> tuple[tuple[OutputCheck, ...], tuple[str, ...]]:
    """Run twice on equal inputs: every bit must be equal."""
    problem, given = case.asked, tensors_of(case)
    first = {name: output.clone() for name, output in subject.run(problem, given).outputs.items()}
    second = subject.run(problem, given).outputs
    checks = tuple(_same_bits(name, first[name], second[name], case.problem) for name in first if first[name].numel())
    return checks, ()


def _same_bits(name: str, first: Tensor, second: Tensor, case: str) -> OutputCheck:
    differing = (first != second) & ~(first.isnan() & second.isnan())
    count = int(differing.sum())
    index = tuple(int(place) for place in differing.nonzero()[0]) if count else (0,) * first.ndim
    error = float((first - second).abs().nan_to_num(torch.inf).max())
    return OutputCheck(
        output=name,
        case=case,
        ratio=float("inf") if count else 0.0,
        error=error,
        bound=0.0,
        index=index,
        elements=first.numel(),
        detail=f"{count} elements differ between two runs" if count else "",
    )


def _property_judges() -> dict[str, Judge]:
    def judge_of(name: str, why: str, position: int) -> Judge:
        def ask(subject: Subject, case: Case) -> tuple[tuple[OutputCheck, ...], tuple[str, ...]]:
            return PROPERTIES[position].judge(subject, case.asked, np.random.default_rng(case.seed)), ()

        return Judge(name, why, ask)

    return {item.name: judge_of(item.name, item.why, position) for position, item in enumerate(PROPERTIES)}


JUDGES: Mapping[str, Judge] = {
    "bound": Judge("bound", "every element lies within a bound derived from the fp64 reference", _bound),
    "repeat": Judge("repeat", "equal inputs give equal bits", _repeat),
    **_property_judges(),
}


def applicable(subject: Subject, case: Case) -> list[str]:
    """Names of the properties that can be tested on the case's problem."""
    problem = case.asked
    contract = subject.contract(problem)
    return [item.name for item in PROPERTIES if item.applies(problem, contract) is None]
