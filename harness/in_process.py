"""The proof of a foreign function in the process of a test: for a library's CI, where a crash is the test runner's to report.

Asks the same cases and judges as `flashtune fuzz` does for the same seed. Refuses to print, and to know a test runner.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import hypothesis
from hypothesis.strategies import SearchStrategy

from harness import suite
from harness.cases import (
    CASES,
    SCHEMA,
    Case,
    Counterexample,
    foreign_strategy,
    read_counterexample,
    write_counterexample,
)
from harness.errors import UsageError
from harness.foreign import Foreign, ForeignSubject
from harness.judges import Finding, applicable
from harness.problem import Dtype, Pass
from harness.shrink import shrink


@dataclass(slots=True, kw_only=True)
class Proof:
    """What was asked, and what was found. `judges` counts the cases about which each judge had something to say, `refused`
    the cases by the reason why they were not asked; `largest` is the greatest error over bound of each output."""

    target: str
    cases: int = 0
    judges: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    found: Counterexample | None = None
    path: Path | None = None

    def text(self) -> str:
        """The counterexample, for a person; else a line."""
        if self.found is None:
            judged = sum(self.judges.values())
            return f"{self.target}: {self.cases} cases, {judged} judgements, nothing wrong"
        case = self.found.case
        inputs = [f"recipe {case.recipe}, seed {case.seed}"]
        inputs += [f"{name} lies {_words(lie)}" for name, lie in CASES.dump_python(case, mode="json")["lies"].items()]
        inputs += [f"{patch.tensor}[{patch.position}] = {patch.value:g} (flat index)" for patch in case.patches]
        lines = [
            f"{self.target} does not compute attention",
            f"  problem   {case.problem}",
            f"  inputs    {'; '.join(inputs)}",
            f"  judge     {self.found.judge}",
            f"  found     {self.found.detail}",
            f"  cases     {self.cases} were asked, the last is this one, shrunk",
        ]
        return "\n".join([*lines, f"  replay    flashtune replay {self.path}"] if self.path else lines)


def _words(lie: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in lie.items() if value)


class _Falsified(Exception):  # noqa: N818  (hypothesis shrinks what raises it; nobody else sees it)
    def __init__(self, case: Case, judge: str, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.case, self.judge, self.finding = case, judge, finding


def cases_of(subject: ForeignSubject, foreign: Foreign) -> SearchStrategy[Case]:
    """A hypothesis strategy: cases that `subject` may be asked, as far as its words decide."""
    able = subject.support.abilities
    passes = [name for name in get_args(Pass) if name in able]
    dtypes = [name for name in get_args(Dtype) if name in able]
    return foreign_strategy(foreign, passes, dtypes, subject.nearest)


def judge_case(subject: ForeignSubject, case: Case, judges: Sequence[str] | None = None) -> Finding | None:
    """What the first of `judges` (default: every one that applies) finds wrong, or None."""
    names = applicable(subject, case) if judges is None else judges
    return next((finding for _, finding, _ in suite.ask_each(subject, case, names) if finding), None)


def prove(
    subject: ForeignSubject, foreign: Foreign, *, profile: suite.Profile, seed: int, corpus: Path | None = None
) -> Proof:
    """Replay the corpus of `foreign`, then ask new cases, to the end of the profile or to the first counterexample.

    A counterexample is shrunk as the profile says, and written into the corpus: one folder for each target below `corpus`.
    """
    proof = Proof(target=foreign.target)
    folder = None if corpus is None else corpus / _slug(foreign.target)
    kept = sorted(folder.glob("*.json")) if folder is not None else []
    for path in kept:
        if _replayed(proof, subject, path):
            return proof
    turn = 0
    while proof.cases < profile.cases + len(kept) and proof.found is None:
        _round(proof, subject, cases_of(subject, foreign), profile, suite.seed_of(seed, turn))
        turn += 1
    if proof.found is not None and folder is not None:
        proof.path = write_counterexample(folder, proof.found)
    return proof


def replay(subject: ForeignSubject, path: Path) -> Proof:
    """Ask every judge about one corpus file."""
    proof = Proof(target=subject.name)
    _replayed(proof, subject, path)
    return proof


def _replayed(proof: Proof, subject: ForeignSubject, path: Path) -> bool:
    case = read_counterexample(path).case
    if case.foreign is None:
        raise UsageError(f"{path} is about the kernel `{case.kernel}`", hint=f"flashtune replay {path}")
    falsified = _judged(proof, subject, case, applicable(subject, case))
    if falsified is not None:
        proof.found, proof.path = _example(falsified), path
    return falsified is not None


def _round(
    proof: Proof, subject: ForeignSubject, strategy: SearchStrategy[Case], profile: suite.Profile, seed: int
) -> None:
    first: list[_Falsified] = []

    @hypothesis.seed(seed)
    @suite.settings_for(profile, suite.ROUND)
    @hypothesis.given(strategy)
    def holds(case: Case) -> None:
        if first:
            # Shrinking: only the judge that objected counts.
            finding = judge_case(subject, case, _still(subject, case, first[0].judge))
            falsified = None if finding is None else _Falsified(case, first[0].judge, finding)
        else:
            falsified = _judged(proof, subject, case, suite.judges_for(subject, case, profile.judges))
            first.extend([falsified] if falsified else [])
        if falsified is not None:
            # One place: hypothesis takes exceptions from two for two bugs.
            raise falsified

    try:
        holds()
    except _Falsified as falsified:
        proof.found = _example(_shrunk(subject, falsified) if profile.shrink else falsified)
    except hypothesis.errors.Flaky:
        found = first[0]
        detail = f"wrong once, right when asked again: {found.finding.detail}"
        proof.found = _example(_Falsified(found.case, found.judge, Finding("flaky", detail)))


def _still(subject: ForeignSubject, case: Case, judge: str) -> list[str]:
    return [judge] if judge in applicable(subject, case) else []


def _shrunk(subject: ForeignSubject, falsified: _Falsified) -> _Falsified:
    finding = falsified.finding

    def fails(case: Case) -> bool:
        nonlocal finding
        found = judge_case(subject, case, _still(subject, case, falsified.judge))
        finding = found or finding
        return found is not None

    case = shrink(falsified.case, {}, fails)
    return _Falsified(case, falsified.judge, finding)


def _judged(proof: Proof, subject: ForeignSubject, case: Case, names: Sequence[str]) -> _Falsified | None:
    """Ask `names` about a case and count what they said."""
    proof.cases += 1
    reason = subject.refuses(case.asked)
    if reason is not None:
        proof.refused[reason] += 1
        return None
    for name, finding, checks in suite.ask_each(subject, case, names):
        if checks or finding:
            proof.judges[name] += 1
        if finding is not None:
            return _Falsified(case, name, finding)
        if name == "bound":
            for check in checks:
                proof.largest[check.output] = max(proof.largest.get(check.output, 0.0), check.ratio)
    return None


def _example(falsified: _Falsified) -> Counterexample:
    finding = falsified.finding
    return Counterexample(
        schema=SCHEMA, case=falsified.case, judge=finding.judge, detail=finding.detail, found_with=_versions()
    )


def _versions() -> dict[str, str]:
    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return {name: found(name) for name in ("torch", "triton", "numpy")}


def _slug(target: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in target)
