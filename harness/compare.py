"""The only definition of "close": what a comparison found, and the verdict made of it.

Refuses to launch or to time anything, and to choose a tolerance: bounds come from `harness.bounds`. Judges fail to
"cannot tell", never to "pass". Importing it does not import torch, because records and reports carry verdicts too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from harness.errors import BugError

if TYPE_CHECKING:
    from torch import Tensor

    from harness.bounds import Expectation

Status = Literal["passed", "wrong", "flaky", "unknown"]

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

    status: Status
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


def judge(outputs: "Mapping[str, Tensor]", expected: "Expectation", *, case: str) -> tuple[OutputCheck, ...]:
    """Compare every expected output, elementwise, and report the worst element of each.

    `case` says in words what was run. An output without elements gives no check, so nothing compared can pass nothing.
    NaN is never close. An infinite truth asks for the same infinity. Where the truth within its bound is too large for the
    dtype of the output, the infinity of its sign is right as well. An element whose bound is negative or not finite
    cannot be judged, and fails with `ratio` NaN. Raises `BugError` if an output is missing, has another shape, or is the
    very memory that it would be compared with.
    """
    missing = sorted(set(expected.truth) ^ set(outputs))
    if missing:
        raise BugError(f"a comparison needs the same outputs on both sides, found only one `{missing[0]}`")
    return tuple(
        _check(name, outputs[name], expected, case) for name in expected.truth if expected.truth[name].numel() > 0
    )


def status_of(checks: Sequence[OutputCheck]) -> Status:
    """What the checks say together: nothing or an unusable bound is unknown, one element out of bounds is wrong."""
    if any(not check.ratio <= 1 and _usable(check.bound) for check in checks):
        return "wrong"
    if not checks or not all(check.ratio <= 1 and check.elements > 0 for check in checks):
        return "unknown"
    return "passed"


def worst(checks: Sequence[OutputCheck]) -> OutputCheck:
    """The check with the greatest ratio, NaN before all. Needs at least one check."""
    return max(checks, key=lambda check: (math.isnan(check.ratio), check.ratio))


def sentence(check: OutputCheck) -> str:
    """A check in words, for instance: dq[0, 1, 17, 3] of `CASE` is off by 0.031, 7.5 times its bound of 0.0041."""
    place = f"{check.output}[{', '.join(map(str, check.index))}] of `{check.case}`"
    if check.detail:
        return f"{place} {check.detail}"
    if check.bound == 0 and check.error:
        return f"{place} must be exact, but is off by {check.error:.3g}"
    return f"{place} is off by {check.error:.3g}, {check.ratio:.3g} times its bound of {check.bound:.3g}"


def _check(name: str, output: "Tensor", expected: "Expectation", case: str) -> OutputCheck:
    truth, bound = expected.truth[name], expected.bounds[name]
    _refuse_misuse(name, output, truth, bound)
    found = output.double()
    same = found == truth
    too_large = (
        found.isinf() & (found.sign() == truth.sign()) & (truth.abs() + bound > expected.largest)
        if output.itemsize < 4
        else same
    )
    error = (found - truth).abs().masked_fill(same | too_large, 0.0)
    ratio = (error / bound).masked_fill(error == 0, 0.0).masked_fill(~(bound.isfinite() & (bound >= 0)), math.nan)
    flat = int(ratio.nan_to_num(nan=math.inf, posinf=1e300).argmax())
    index = []
    for size in reversed(output.shape):
        flat, position = divmod(flat, size)
        index.append(position)
    where = tuple(reversed(index))
    return OutputCheck(
        output=name,
        case=case,
        ratio=ratio[where].item(),
        error=error[where].item(),
        bound=bound[where].item(),
        index=where,
        elements=output.numel(),
        detail=_remark(found[where].item(), truth[where].item(), bound[where].item()),
    )


def _refuse_misuse(name: str, output: "Tensor", truth: "Tensor", bound: "Tensor") -> None:
    for other in (truth, bound):
        if output.shape != other.shape:
            raise BugError(f"`{name}` has shape {tuple(output.shape)}, but is judged by {tuple(other.shape)}")
        if output.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
            raise BugError(f"`{name}` is compared with itself")


def _usable(bound: float) -> bool:
    return math.isfinite(bound) and bound >= 0


def _remark(found: float, truth: float, bound: float) -> str:
    if not _usable(bound):
        return f"cannot be judged: its bound is {bound}"
    if math.isnan(found):
        return f"is NaN, where {truth:.6g} is right"
    if math.isinf(found) != math.isinf(truth) or (math.isinf(found) and found != truth):
        return f"is {found:.6g}, where {truth:.6g} is right"
    return ""
