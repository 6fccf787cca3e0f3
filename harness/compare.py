"""The only definition of "close": what a comparison found, and the verdict made of it.

Refuses to launch or to time anything. Judges fail to "cannot tell", never to "pass".
"""

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_VALUE = ConfigDict(extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class OutputCheck:
    """The worst element of one output of one case. `ratio` is error over bound there: at most 1 passes; NaN never does."""

    output: str
    case: str
    ratio: float
    error: float
    bound: float
    index: tuple[int, ...]
    elements: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Verdict:
    """What a judge said of a candidate.

    `where` it was obtained; `blind_to` what a judge there cannot see; `cases` the problems that were run, in notation;
    `checks` the worst element per output and case; `detail` the reason in words when it did not pass.
    """

    status: Literal["passed", "wrong", "flaky", "unknown"]
    where: Literal["interpreter", "device"]
    oracle: str
    cases: tuple[str, ...]
    seed: int
    checks: tuple[OutputCheck, ...]
    blind_to: tuple[str, ...] = ()
    detail: str = ""

    def __post_init__(self) -> None:
        if self.status == "passed":
            if not self.cases or not self.checks:
                raise ValueError("a verdict that compared nothing cannot pass")
            if not all(check.ratio <= 1 and check.elements > 0 for check in self.checks):
                raise ValueError("a verdict with a failed or empty check cannot pass")

    @property
    def passed(self) -> bool:
        return self.status == "passed"
