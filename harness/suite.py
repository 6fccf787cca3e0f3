"""The suite: which judges are asked about a case, how many cases, and what a campaign costs, by profile.

One place decides, so that what `flashtune mutants` measures is what `flashtune fuzz` does. Refuses to run anything by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase

from harness.cases import Case
from harness.compare import OutputCheck
from harness.errors import RefusedError, SubjectError, UsageError, did_you_mean
from harness.judges import JUDGES, Finding, Judge, applicable
from harness.subject import Subject
from harness.workspace import SUITE_MODULES, digest_modules

# How often a judge is drawn beside the bound, where a property has weight 1: those that look at memory and at arithmetic see
# what no other does, and cost one run each.
_WEIGHTS: Mapping[str, float] = {"bound": 0.0, "repeat": 0.5, "shadow": 8.0, "fp64": 6.0, "far": 3.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A stock campaign. `cases` and `time_s` are its ends, whichever is first; `judges` are drawn for each case beside the bound;
    `target` lets hypothesis climb towards greater errors, `shrink` makes a counterexample small."""

    name: str
    why: str
    cases: int
    time_s: float
    judges: int = 4
    target: bool = True
    shrink: bool = True


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="pr", why="for every change: the same cases each time", cases=60, time_s=300, target=False),
        Profile(name="nightly", why="for every night: pass another seed each time", cases=5000, time_s=3600, judges=5),
        Profile(name="gpu", why="compiled kernels: many cases for each compile", cases=400, time_s=600, judges=5),
        Profile(
            name="mutation", why="planted bugs: a fixed sequence, no shrinking", cases=640, time_s=600, target=False,
            shrink=False,
        ),
        Profile(name="repro", why="the corpus only: what was found once, again", cases=0, time_s=600),
    )
}  # fmt: skip


def profile_for(name: str) -> Profile:
    """The profile of that name. Raises `UsageError` naming the nearest one."""
    if name not in PROFILES:
        raise UsageError(f"there is no profile `{name}`", hint=did_you_mean(name, list(PROFILES)))
    return PROFILES[name]


def settings_for(profile: Profile, cases: int) -> hypothesis.settings:
    """How hypothesis runs `cases` examples of a profile. Its database stays off: what was found goes into the corpus."""
    phases = [Phase.generate]
    phases += [Phase.target] if profile.target else []
    phases += [Phase.shrink] if profile.shrink else []
    return hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )


def judges_for(subject: Subject, case: Case, count: int) -> list[str]:
    """The names of the judges to ask about a case: the bound, and `count` drawn from those that apply, by the case alone."""
    names = [name for name in applicable(subject, case) if _WEIGHTS.get(name, 1.0)]
    # Where memory cannot be watched, what races or was never written shows as a difference between runs.
    weighed = _WEIGHTS if "shadow" in names else {**_WEIGHTS, "repeat": _WEIGHTS["shadow"] / 2}
    weights = np.array([weighed.get(name, 1.0) for name in names])
    rng = np.random.default_rng(int(case.id, 16))
    if not names:
        return ["bound"]
    drawn = rng.choice(names, size=min(count, len(names)), replace=False, p=weights / weights.sum())
    return ["bound", *map(str, drawn)]


Found = tuple[Finding | None, tuple[OutputCheck, ...]]


def ask(subject: Subject, case: Case, name: str, judges: Mapping[str, Judge] = JUDGES) -> Found:
    """What one judge finds. A refusal compares nothing; what the subject raises is a finding named "exception"."""
    try:
        return judges[name].find(subject, case)
    except RefusedError:
        return None, ()
    except SubjectError as raised:
        return Finding("exception", str(raised)), ()


def ask_each(
    subject: Subject, case: Case, names: Sequence[str], judges: Mapping[str, Judge] = JUDGES
) -> Iterator[tuple[str, Finding | None, tuple[OutputCheck, ...]]]:
    """What each judge in `names` finds, one after the other; a judge is not asked before its turn."""
    if subject.refuses(case.asked) is not None:
        return
    for name in names:
        yield (name, *ask(subject, case, name, judges))


# Examples that hypothesis draws at a time: it varies what it has drawn, so many small rounds see more than a large one.
ROUND = 10


def seed_of(seed: int, turn: int) -> int:
    """The seed of one round of a campaign."""
    return seed * 1_000_003 + turn


def fixed_cases(strategy: "hypothesis.strategies.SearchStrategy[Case]", count: int, seed: int) -> tuple[Case, ...]:
    """The first `count` different cases of a campaign, drawn without asking anything."""
    drawn: dict[str, Case] = {}
    turn = 0
    while len(drawn) < count:

        @hypothesis.seed(seed_of(seed, turn))
        @settings_for(PROFILES["mutation"], ROUND)
        @hypothesis.given(strategy)
        def keep(case: Case) -> None:
            drawn.setdefault(case.id, case)

        keep()
        turn += 1
    return tuple(drawn.values())[:count]


def suite_digest() -> str:
    """Digest of the code that makes up the suite: a measured kill rate belongs to one."""
    return digest_modules(SUITE_MODULES)
